// Files that a stream begins from: an image (image-to-video), or a video whose frames are sent one by one.

const LARGEST = 1 << 20; // bytes of an image that is sent as it is
const SIDE = 1280; // longest side of an image that is made smaller

/** What kind of file it is: "image", "video", or null for what the page cannot use. */
export function kindOf(file) {
  if (/^image\/(png|jpeg|webp)$/.test(file.type)) return "image";
  return file.type.startsWith("video/") ? "video" : null;
}

/** An image file in base64, made smaller where it is large. Throws Error where the browser cannot read it. */
export async function imageBase64(file) {
  const bitmap = await createImageBitmap(file).catch(() => {
    throw new Error(`${file.name} is not an image that this browser can read.`);
  });
  const blob = file.size <= LARGEST ? file : await toJpeg(bitmap, SIDE);
  bitmap.close();
  return base64(new Uint8Array(await blob.arrayBuffer()));
}

function toJpeg(bitmap, side) {
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
}

function base64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

/** A video file, decoded frame by frame at any frame rate; it begins again at its end. */
export class VideoFile {
  #video = document.createElement("video");

  /** Throws Error where the browser cannot play the file. */
  static async open(file) {
    const opened = new VideoFile();
    await opened.#load(file);
    return opened;
  }

  async #load(file) {
    this.#video.muted = true;
    this.#video.playsInline = true;
    this.#video.preload = "auto";
    this.#video.src = URL.createObjectURL(file);
    await new Promise((resolve, reject) => {
      this.#video.onloadeddata = resolve;
      this.#video.onerror = () => reject(new Error(`${file.name} is not a video that this browser can play.`));
    });
    if (!Number.isFinite(this.#video.duration)) throw new Error(`${file.name} does not say how long it is.`);
  }

  get seconds() {
    return this.#video.duration;
  }

  /** Frame `index` at a frame rate, cropped to fill width x height, as JPEG bytes. */
  async frame(index, frameRate, width, height) {
    const last = Math.max(1, Math.floor(this.seconds * frameRate));
    await this.#seek(((index % last) + 0.5) / frameRate);
    const canvas = new OffscreenCanvas(width, height);
    const { videoWidth, videoHeight } = this.#video;
    const scale = Math.max(width / videoWidth, height / videoHeight);
    const [across, down] = [width / scale, height / scale];
    const from = [(videoWidth - across) / 2, (videoHeight - down) / 2];
    canvas.getContext("2d").drawImage(this.#video, ...from, across, down, 0, 0, width, height);
    return (await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 })).arrayBuffer();
  }

  /** A small still for the page, as an address. */
  async still() {
    const frame = await this.frame(0, 10, 64, 64);
    return URL.createObjectURL(new Blob([frame], { type: "image/jpeg" }));
  }

  #seek(time) {
    return new Promise((resolve, reject) => {
      this.#video.onseeked = resolve;
      this.#video.onerror = () => reject(new Error("the video cannot be decoded"));
      this.#video.currentTime = Math.min(time, this.seconds);
    });
  }

  close() {
    URL.revokeObjectURL(this.#video.src);
    this.#video.removeAttribute("src");
  }
}

/** Sends the frames of a video when the server says that they are due; some are decoded before. */
export class FrameSender {
  #sent = 0;
  #until = 0;
  #decoded = []; // the frames from #sent on
  #working = false;
  #stopped = false;

  /** failed(error): the video cannot be decoded any more. */
  constructor(file, session, { frame_rate: frameRate, width, height, frames_per_chunk: ahead }, failed) {
    Object.assign(this, { file, session, frameRate, width, height, ahead, failed });
  }

  due({ first, frames }) {
    if (first !== this.#sent) this.#decoded = []; // what a lost socket took along is due again
    this.#sent = first;
    this.#until = first + frames;
    if (!this.#working) this.#work().catch(this.failed);
  }

  async #work() {
    this.#working = true;
    while (!this.#stopped && (this.#sent < this.#until || this.#decoded.length < this.ahead)) {
      this.#send();
      const decoded = this.#decoded;
      const frame = await this.file.frame(this.#sent + decoded.length, this.frameRate, this.width, this.height);
      decoded.push(frame); // into a list that is no longer used, if others became due meanwhile
      this.#send();
    }
    this.#working = false;
  }

  #send() {
    while (this.#sent < this.#until && this.#decoded.length && !this.#stopped) {
      if (!this.session.sendFrame(this.#decoded[0])) {
        this.#until = this.#sent; // no socket: due again on the next one
        return;
      }
      this.#decoded.shift();
      this.#sent += 1;
    }
  }

  stop() {
    this.#stopped = true;
  }
}
