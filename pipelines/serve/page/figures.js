// What a stream measures about itself, and how it is drawn: the chart of chunk gaps and the timeline of prompts.

const CHUNKS = 48; // bars in the chart
const WINDOW = 3000; // milliseconds that the frame rate is counted over

export class Figures {
  #asked = 0;
  #switchAsked = null;
  #switchFrame = null;
  #lastChunk = null;
  #shown = []; // [time, frames shown by then]

  constructor() {
    this.first = null; // seconds from the request to the first frame
    this.change = null; // seconds from the last new prompt to its first frame
    this.gaps = []; // {seconds, target, late, turned}
    this.late = 0; // chunks that were made after their deadline
    this.frames = 0;
  }

  /** The stream is asked for now, or its turn in the queue has come. */
  ask() {
    this.#asked = performance.now();
  }

  askPrompt() {
    this.#switchAsked ??= performance.now();
  }

  promptFrom(frame) {
    this.#switchFrame = frame;
  }

  media(first, frames) {
    const now = performance.now();
    this.first ??= (now - this.#asked) / 1000;
    this.frames += frames;
    if (this.#switchFrame === null || first < this.#switchFrame) return;
    if (this.#switchAsked !== null) this.change = (now - this.#switchAsked) / 1000;
    this.#switchAsked = this.#switchFrame = null;
  }

  chunk(record, frameRate) {
    const now = performance.now();
    const target = record.frames / frameRate;
    this.late += record.late > 0;
    const turned = this.gaps.length > 0 && record.prompt !== this.gaps.at(-1).prompt;
    if (this.#lastChunk !== null) {
      const seconds = (now - this.#lastChunk) / 1000;
      this.gaps.push({ seconds, target, late: record.late > 0, turned, prompt: record.prompt });
      this.gaps.splice(0, this.gaps.length - 1000);
    }
    this.#lastChunk = now;
  }

  /** The clock of the gaps stands still: paused, or the socket is lost. */
  interrupt() {
    this.#lastChunk = null;
    this.#shown = [];
  }

  /** Frames shown per second over the last seconds; null before there is something to count. */
  rate(shown) {
    const now = performance.now();
    this.#shown.push([now, shown]);
    while (this.#shown.length > 2 && this.#shown[1][0] <= now - WINDOW) this.#shown.shift();
    const [then, before] = this.#shown[0];
    return now - then < 500 ? null : Math.max(0, ((shown - before) * 1000) / (now - then));
  }

  /** A quantile of the gaps in seconds; null where there are none. */
  gap(share) {
    const sorted = this.gaps.map((gap) => gap.seconds).sort((one, other) => one - other);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : null;
  }
}

export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const minutes = Math.floor(whole / 60);
  const rest = String(whole % 60).padStart(2, "0");
  return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${String(minutes % 60).padStart(2, "0")}:${rest}`;
}

export function short(seconds) {
  if (seconds === null) return "–";
  return seconds < 1 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** One bar per chunk. The line is real time: what a chunk's pictures last. Bars past it are in the accent colour. */
export function drawGaps(canvas, gaps) {
  const scale = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  if (!width) return;
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  pen.scale(scale, scale);
  const shown = gaps.slice(-CHUNKS);
  const target = shown.at(-1)?.target ?? 0.75;
  const top = Math.max(target * 1.6, ...shown.map((gap) => Math.min(gap.seconds, target * 4)));
  const step = width / CHUNKS;
  shown.forEach((gap, place) => {
    const high = Math.max(1.5, Math.min(1, gap.seconds / top) * (height - 1));
    const left = width - (shown.length - place) * step;
    pen.fillStyle = style.getPropertyValue(gap.late || gap.seconds > gap.target * 1.25 ? "--accent" : "--bar");
    pen.beginPath();
    pen.roundRect(left + 1, height - high, Math.max(1, step - 2), high, 1.5);
    pen.fill();
  });
  pen.fillStyle = style.getPropertyValue("--muted");
  for (let left = 0; left < width; left += 6) pen.fillRect(left, height - (target / top) * (height - 1), 3, 1);
}

/** Which seconds each prompt made: [{from, to, prompt}] of the marks of a player. */
export function segments(marks, end) {
  return marks
    .map((mark, place) => ({ from: mark.time, to: marks[place + 1]?.time ?? Math.max(end, mark.time), prompt: mark.prompt }))
    .filter((segment) => segment.to > segment.from);
}

/** Fill the track with one strip per segment, and veil what is not played yet. */
export function drawTimeline(timeline, parts, { position, end }) {
  const track = timeline.querySelector(".track");
  while (track.children.length > parts.length) track.lastChild.remove();
  while (track.children.length < parts.length) track.append(document.createElement("span"));
  parts.forEach((part, place) => {
    const strip = track.children[place];
    strip.style.flexGrow = Math.max(1, 1000 * (part.to - part.from)); // a sum under 1 would not fill the track
    strip.textContent = String(part.prompt + 1);
    strip.classList.toggle("now", position >= part.from && (position < part.to || place === parts.length - 1));
  });
  const unplayed = timeline.querySelector(".unplayed");
  unplayed.hidden = parts.length === 0;
  unplayed.style.left = `${end > 0 ? Math.min(100, (100 * position) / end) : 0}%`;
}
