// A stream's WebSocket: the messages, and how it comes back after the socket is lost. Knows nothing of the page.

const VERSION = 1;
const FIRST_DELAY = 500; // milliseconds before the first try to come back; doubled with each try
const LONGEST_DELAY = 15000;
const SILENCE = 30000; // a server that may send and does not for so long: the socket is lost, and nobody has noticed
const REFUSED = 1008; // close code after an error that trying again would not mend
const BUSY = 1013;
const TRIES = 4; // in a row, where none was answered or each failed; without a network a stream is tried for ever
const PASSING = new Set(["too_many_sessions", "too_many_requests"]); // errors that time mends

export const KIND = { init: 0, fragment: 1, jpeg: 2 };

/** Numbers of frames in an fMP4 media fragment: the sample counts of its `trun` boxes. */
export function framesIn(fragment) {
  const view = new DataView(fragment.buffer, fragment.byteOffset, fragment.byteLength);
  let frames = 0;
  const walk = (from, to) => {
    for (let at = from; at + 8 <= to; ) {
      const size = view.getUint32(at);
      const name = String.fromCharCode(...fragment.subarray(at + 4, at + 8));
      const end = size >= 8 ? Math.min(at + size, to) : to; // 0: to the end; 1 (64 bit) is only ever used for mdat
      if (name === "moof" || name === "traf") walk(at + 8, end);
      if (name === "trun") frames += view.getUint32(at + 12);
      at = end;
    }
  };
  walk(0, fragment.byteLength);
  return frames;
}

/** The delay before try number `attempt` (1, 2, ...) to come back; `dice` in [0, 1) spreads many pages out. */
export function delayOf(attempt, dice) {
  return Math.min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1)) * (0.8 + 0.4 * dice);
}

/**
 * One stream, over as many sockets as it takes.
 *
 * hear(name, detail) is called with
 *   "connecting" {attempt}, "waiting" {attempt, delay, message}: of the socket
 *   "ready", "queued", "chunk", "prompt", "paused", "resumed", "moved", "due", "error", ...: the server's records
 *   "media" {kind, first, frames, prompt, payload}: in order, each frame once
 *   "closed" {reason: "ended" | "stopped" | "error" | "busy", message, code}: nothing comes any more
 */
export class Session {
  #socket = null;
  #timer = 0;
  #watch = 0;
  #heard = 0;
  #attempt = 0;
  #over = false;
  #failure = null; // the server's last `error` or `busy`, which says why it closed
  #unanswered = null; // a prompt that no `prompt` record has answered yet
  #opened = false;
  #told = -1; // the last `seen` of this socket

  constructor(address, key, start, hear) {
    this.address = address;
    this.key = key;
    this.start = start;
    this.hear = hear;
    this.stream = null;
    this.next = 0; // index of the first frame that is missing
    this.lost = 0;
    this.paused = false;
    this.prompts = [{ text: start.prompt, frame: 0 }];
  }

  open() {
    window.addEventListener("online", this.#retryNow);
    this.#watch = setInterval(() => this.#checkSilence(), 5000);
    this.#connect();
  }

  prompt(text) {
    this.#unanswered = text;
    this.#say({ type: "prompt", text });
  }

  pause() {
    this.paused = true;
    this.#say({ type: "pause" });
  }

  resume() {
    this.paused = false;
    this.#say({ type: "resume" });
  }

  /** Flow control: the server sends only so far ahead of this. */
  seen() {
    this.#told = this.next;
    this.#say({ type: "seen", frame: this.next });
  }

  stop() {
    this.#say({ type: "stop" });
    this.#finish({ reason: "stopped" });
  }

  /** A source frame of a live video-to-video stream. False: there is no socket to send it on now. */
  sendFrame(bytes) {
    if (this.#socket?.readyState !== WebSocket.OPEN) return false;
    this.#socket.send(bytes);
    return true;
  }

  /** Which prompt made a frame: an index into `prompts`. */
  promptOf(frame) {
    return this.prompts.findLastIndex((prompt) => prompt.frame <= frame);
  }

  #say(message) {
    if (this.#socket?.readyState === WebSocket.OPEN) this.#socket.send(JSON.stringify(message));
  }

  #connect() {
    this.#opened = false;
    this.#told = -1;
    this.hear("connecting", { attempt: this.#attempt });
    const protocols = ["reelway.v1"];
    if (this.key) protocols.push(`reelway.key.${this.key}`);
    let socket;
    try {
      socket = new WebSocket(this.address, protocols);
    } catch {
      this.#finish({ reason: "error", code: "wrong_key", message: "The key has characters that no key has." });
      return;
    }
    socket.binaryType = "arraybuffer";
    socket.onopen = () => this.#begin();
    socket.onmessage = (event) => socket === this.#socket && this.#receive(event.data);
    socket.onclose = (event) => socket === this.#socket && this.#closed(event);
    this.#socket = socket;
    this.#heard = performance.now();
  }

  #begin() {
    this.#opened = true;
    this.#failure = null;
    this.#heard = performance.now();
    const { media, quality } = this.start;
    const first = this.stream
      ? { type: "reconnect", version: VERSION, stream: this.stream, frame: this.next, media, quality }
      : { type: "start", version: VERSION, ...this.start };
    this.#say(first);
  }

  #receive(data) {
    this.#heard = performance.now();
    if (typeof data === "string") this.#hearRecord(JSON.parse(data));
    else this.#hearMedia(new Uint8Array(data));
  }

  #hearRecord(record) {
    if (record.type === "ready") this.#ready(record);
    if (record.type === "prompt") this.#turned(record);
    if (record.type === "error" && record.recoverable) this.#unanswered = null;
    else if (record.type === "error" || record.type === "busy") this.#failure = record;
    this.hear(record.type, record);
    if (record.type === "end") this.#finish({ reason: "ended", message: record.reason, frames: record.frames });
  }

  #ready(record) {
    const cameBack = this.stream !== null;
    this.stream = record.stream;
    if (!cameBack) return;
    if (this.paused) this.#say({ type: "pause" });
    if (this.#unanswered !== null) this.#say({ type: "prompt", text: this.#unanswered });
  }

  #turned(record) {
    if (record.text === this.#unanswered) this.#unanswered = null;
    this.prompts = this.prompts.filter((prompt) => prompt.frame < record.frame);
    this.prompts.push({ text: record.text, frame: record.frame });
  }

  #hearMedia(message) {
    const kind = message[0];
    const payload = message.subarray(9);
    if (kind === KIND.init) {
      this.hear("media", { kind, payload, first: 0, frames: 0, prompt: 0 });
      return;
    }
    const first = Number(new DataView(message.buffer, message.byteOffset).getBigUint64(1));
    const frames = kind === KIND.jpeg ? 1 : framesIn(payload);
    if (first + frames <= this.next) return; // it was here before the socket was lost
    this.#countLost(first);
    this.next = first + frames;
    this.#attempt = 0; // only media shows that it works again
    this.hear("media", { kind, first, frames, payload, prompt: this.promptOf(first) });
  }

  /** Frames between the last one and `first` are missing, unless a new prompt begins in between: those were flushed. */
  #countLost(first) {
    const flushed = this.prompts.some((prompt) => prompt.frame > this.next && prompt.frame <= first);
    if (first > this.next && !flushed) this.lost += first - this.next;
  }

  #closed(event) {
    if (this.#over) return;
    const failure = this.#failure;
    const message = failure?.message ?? failure?.reason ?? event.reason;
    if (this.stream && PASSING.has(failure?.code)) this.#comeBack();
    else if (event.code === BUSY && !this.stream) this.#finish({ reason: "busy", message });
    else if (event.code === REFUSED || event.code === 1000)
      this.#finish({ reason: event.code === 1000 ? "ended" : "error", code: failure?.code, message });
    else if (!this.#opened) this.#explainRefusal();
    else this.#comeBack();
  }

  /** A socket that never opened says nothing about why; a plain request to the same server does. */
  async #explainRefusal() {
    const url = new URL("models", this.address.replace(/^ws/, "http"));
    const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
    const answer = await fetch(url, { headers, cache: "no-store" }).catch(() => null);
    if (this.#over) return;
    this.#failure = null; // that was another socket's
    if (answer?.status === 401 || answer?.status === 403)
      this.#finish({ reason: "error", code: "wrong_key", message: "" });
    else this.#comeBack();
  }

  #comeBack() {
    this.#attempt += 1;
    if (this.#attempt > TRIES && (!this.stream || this.#failure?.code === "failed")) {
      const message = this.#failure?.message ?? "The server cannot be reached. Play tries again.";
      this.#finish({ reason: "error", message });
      return;
    }
    const delay = delayOf(this.#attempt, Math.random());
    this.hear("waiting", { attempt: this.#attempt, delay, message: this.#failure?.message });
    this.#timer = setTimeout(() => this.#connect(), delay);
  }

  #retryNow = () => {
    if (!this.#timer || this.#socket?.readyState !== WebSocket.CLOSED) return;
    clearTimeout(this.#timer);
    this.#connect();
  };

  #checkSilence() {
    const maySend = this.#socket?.readyState === WebSocket.OPEN && !this.paused && this.#told === this.next;
    if (maySend && performance.now() - this.#heard > SILENCE) this.#drop();
  }

  /** Give up a socket at once: its close may take minutes where the network is gone. */
  #drop() {
    const socket = this.#socket;
    this.#socket = null;
    socket.close();
    this.#comeBack();
  }

  #finish(detail) {
    if (this.#over) return;
    this.#over = true;
    clearTimeout(this.#timer);
    clearInterval(this.#watch);
    window.removeEventListener("online", this.#retryNow);
    this.#socket?.close(1000);
    this.hear("closed", detail);
  }
}
