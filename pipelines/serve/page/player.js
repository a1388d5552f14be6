// Two players with one face: fragmented MP4 through Media Source Extensions, and JPEG frames on a canvas.
//
//   add({kind, first, frames, prompt, payload})   media, in order
//   cutFrom(frame)      when media from this frame on comes, what is buffered of older media is dropped
//   pause(), play(), end(), close()
//   position            seconds played;  ahead: seconds buffered and not yet played
//   marks               [{time, prompt}]: from which second on which prompt's pictures are seen
//   shown               frames shown so far;  stalls: how often the buffer ran dry

import { KIND } from "./wire.js";

const START = 0.25; // seconds in the buffer before playing begins, and again after it ran dry
const KEPT = 20; // seconds of played media that stay in the browser's buffer
const MARGIN = 0.2; // seconds just ahead of the picture that a cut leaves alone: the decoder has them already

const Source = window.ManagedMediaSource ?? window.MediaSource;

export function canPlayMp4(mime = 'video/mp4; codecs="avc1.42C01E"') {
  return Boolean(Source?.isTypeSupported(mime));
}

export class Mp4Player {
  #tasks = [];
  #working = false;
  #source = new Source();
  #buffer = null;
  #cut = null; // frame from which on the next media replaces what is buffered
  #wanted = true; // whether the user wants it to play
  #dry = true; // nothing to play: waits until START seconds are there
  #begun = false;
  #ended = false;
  #listening = new AbortController();

  constructor(video, mime, frameRate) {
    this.video = video;
    this.mime = mime;
    this.frameRate = frameRate;
    this.marks = [];
    this.stalls = 0;
    this.#listen();
    video.disableRemotePlayback = true; // a ManagedMediaSource asks for it
    video.src = URL.createObjectURL(this.#source);
    video.hidden = false;
  }

  #listen() {
    const { signal } = this.#listening;
    this.#source.addEventListener("sourceopen", () => this.#opened(), { once: true });
    this.video.addEventListener("waiting", () => this.#ranDry(), { signal });
  }

  #opened() {
    URL.revokeObjectURL(this.video.src);
    this.#buffer = this.#source.addSourceBuffer(this.mime);
    this.#buffer.mode = "sequence"; // media follows on what is there, whatever times a new server gives it
    this.#work();
  }

  add(media) {
    this.#tasks.push(() => this.#append(media));
    this.#work();
  }

  cutFrom(frame) {
    this.#cut = frame;
  }

  pause() {
    this.#wanted = false;
    this.video.pause();
  }

  play() {
    this.#wanted = true;
    this.#pump();
  }

  /** No more media comes: what is buffered is played to its end. */
  end() {
    this.#ended = true;
    this.#tasks.push(async () => this.#source.readyState === "open" && this.#source.endOfStream());
    this.#work();
  }

  /** Take the media away; the last picture stays as the video's poster would. */
  close() {
    this.#listening.abort();
    this.#tasks = [];
    this.video.pause();
    this.video.removeAttribute("src");
    this.video.load();
    this.video.hidden = true;
  }

  get position() {
    return this.video.currentTime;
  }

  get ahead() {
    return Math.max(0, this.#end() - this.video.currentTime);
  }

  get shown() {
    return this.video.getVideoPlaybackQuality().totalVideoFrames;
  }

  /** Tasks run one after the other: a source buffer takes one change at a time. */
  async #work() {
    if (this.#working || !this.#buffer) return;
    this.#working = true;
    while (this.#tasks.length) {
      try {
        await this.#tasks.shift()();
      } catch (error) {
        if (error.name !== "QuotaExceededError") this.failed?.(error);
      }
      this.#pump();
    }
    this.#working = false;
  }

  async #append({ kind, first, prompt, payload }) {
    if (kind === KIND.fragment && this.#cut !== null && first >= this.#cut) await this.#dropBuffered();
    if (kind === KIND.fragment) this.#mark(prompt);
    await this.#change((buffer) => buffer.appendBuffer(payload));
    const kept = this.video.currentTime - KEPT;
    if (kept - this.#start() > KEPT) await this.#change((buffer) => buffer.remove(0, kept));
  }

  #mark(prompt) {
    if (this.marks.at(-1)?.prompt !== prompt) this.marks.push({ time: this.#end(), prompt });
  }

  /** Old media that is not yet played goes; new media follows right on what is left. */
  async #dropBuffered() {
    this.#cut = null;
    const from = this.video.currentTime + MARGIN;
    if (this.#end() <= from) return;
    await this.#change((buffer) => buffer.remove(from, Infinity));
    this.#buffer.timestampOffset = this.#end();
    this.marks = this.marks.filter((mark) => mark.time < this.#end());
  }

  #change(action) {
    return new Promise((resolve, reject) => {
      this.#buffer.addEventListener("updateend", resolve, { once: true });
      this.#buffer.addEventListener("error", () => reject(new Error("the media cannot be decoded")), { once: true });
      action(this.#buffer);
    });
  }

  #start() {
    return this.#buffer?.buffered.length ? this.#buffer.buffered.start(0) : 0;
  }

  #end() {
    const ranges = this.#buffer?.buffered;
    return ranges?.length ? ranges.end(ranges.length - 1) : 0;
  }

  #ranDry() {
    if (this.#dry || this.#ended || !this.#begun || this.video.seeking || this.ahead > START) return;
    this.stalls += 1;
    this.#dry = true;
    this.video.pause();
  }

  #pump() {
    if (this.#dry && (this.ahead >= START || this.#ended)) this.#dry = false;
    if (!this.#wanted || this.#dry || !this.video.paused || this.video.ended) return;
    this.#begun = true;
    this.video.play().catch(() => {}); // a play() that the next pause() interrupts rejects
  }
}

export class JpegPlayer {
  #queue = []; // {first, prompt, picture: promise of an ImageBitmap}
  #cut = null;
  #wanted = true;
  #dry = true;
  #begun = false;
  #ended = false;
  #due = 0; // when the next frame is to be shown
  #timer = 0;
  #closed = false;

  constructor(canvas, mime, frameRate) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.frameRate = frameRate;
    this.marks = [];
    this.stalls = 0;
    this.shown = 0;
    canvas.hidden = false;
  }

  add({ first, prompt, payload }) {
    if (this.#cut !== null && first >= this.#cut) this.#dropQueued();
    const picture = createImageBitmap(new Blob([payload], { type: "image/jpeg" }));
    picture.catch((error) => this.failed?.(error));
    if (this.marks.at(-1)?.prompt !== prompt) this.marks.push({ time: this.position + this.ahead, prompt });
    this.#queue.push({ first, prompt, picture });
    if (!this.#timer) this.#tick();
  }

  cutFrom(frame) {
    this.#cut = frame;
  }

  pause() {
    this.#wanted = false;
  }

  play() {
    this.#wanted = true;
    this.#due = performance.now();
    if (!this.#timer) this.#tick();
  }

  end() {
    this.#ended = true;
    if (!this.#timer) this.#tick();
  }

  close() {
    this.#closed = true;
    clearTimeout(this.#timer);
    this.#queue = [];
    this.canvas.hidden = true;
  }

  get position() {
    return this.shown / this.frameRate;
  }

  get ahead() {
    return this.#queue.length / this.frameRate;
  }

  #dropQueued() {
    this.#cut = null;
    this.#queue.length = Math.min(this.#queue.length, Math.ceil(MARGIN * this.frameRate));
    this.marks = this.marks.filter((mark) => mark.time < this.position + this.ahead);
  }

  async #tick() {
    this.#timer = 1; // one tick at a time
    await this.#advance();
    const waits = !this.#wanted || (this.#dry && !this.#enough()); // then add(), play() or end() wakes it
    const wait = Math.min(50, Math.max(0, this.#due - performance.now()));
    this.#timer = waits || this.#closed ? 0 : setTimeout(() => this.#tick(), wait);
  }

  #enough() {
    return this.ahead >= START || (this.#ended && this.#queue.length > 0);
  }

  async #advance() {
    const now = performance.now();
    if (!this.#begun && this.#queue.length) await this.#showFirst();
    if (!this.#wanted || this.#closed) return;
    if (this.#dry && this.#enough()) {
      this.#dry = false;
      this.#due = now;
    }
    if (this.#dry || now < this.#due) return;
    if (this.#queue.length) await this.#show(this.#queue.shift());
    else this.#ranDry();
    const period = 1000 / this.frameRate;
    this.#due = Math.max(this.#due, now - period) + period; // what a sleeping page missed is not rushed through
  }

  /** The first picture is shown before there is enough to play. */
  async #showFirst() {
    this.#begun = true;
    await this.#show(this.#queue.shift());
  }

  async #show({ picture }) {
    const bitmap = await picture.catch(() => null);
    this.shown += 1;
    if (!bitmap || this.#closed) return;
    if (this.canvas.width !== bitmap.width) this.canvas.width = bitmap.width;
    if (this.canvas.height !== bitmap.height) this.canvas.height = bitmap.height;
    this.context.drawImage(bitmap, 0, 0);
    bitmap.close();
  }

  #ranDry() {
    if (!this.#ended) this.stalls += 1;
    this.#dry = true;
  }
}
