// One stream on the page: its picture, its controls and its figures.

import { Session } from "./wire.js";
import { JpegPlayer, Mp4Player, canPlayMp4 } from "./player.js";
import { FrameSender, VideoFile, imageBase64, kindOf } from "./source.js";
import { Figures, clock, drawGaps, drawTimeline, segments, short } from "./figures.js";

const FULL = 4; // seconds in the player at which the server is no longer told to go on
const QUALITY = 90; // of the media, 1 to 100
const CRISP = 160; // pictures narrower than this are shown with sharp pixels

const EXAMPLES = {
  tiny: [
    "a large red circle circling fast on black",
    "a big yellow star bouncing slowly on navy",
    "a small cyan triangle drifts slowly left over a white background",
  ],
  other: [
    "A lighthouse on a cliff in a storm, waves breaking, cinematic light",
    "A red panda walks along a mossy branch, close view, soft morning light",
    "A tram crosses a rainy street at night, neon signs reflected in the puddles",
  ],
};

const STATES = {
  idle: "Ready",
  connecting: "Connecting",
  queued: "Waiting",
  starting: "First frame is being made",
  live: "Live",
  paused: "Paused",
  lost: "Connection lost",
  ended: "Ended",
  stopped: "Stopped",
  busy: "Busy",
  error: "Not possible",
};
const RUNNING = new Set(["connecting", "queued", "starting", "live", "paused", "lost"]);

export class StreamCard {
  #session = null;
  #player = null;
  #sender = null;
  #figures = new Figures();
  #file = null; // {kind, file, video?, still}
  #format = null; // the server's `ready`
  #models = [];
  #unseen = false; // whether media came that the server was not told of

  constructor(template, shared) {
    this.shared = shared;
    this.element = template.content.firstElementChild.cloneNode(true);
    this.part = (name) => this.element.querySelector(`.${name}`);
    this.state = "idle";
    if (!canPlayMp4()) {
      this.part("media").value = "jpeg";
      this.part("media").options[0].disabled = true;
    }
    this.part("seed").value = String(Math.floor(Math.random() * 1000));
    this.#listen();
    this.#show("idle");
  }

  focus() {
    this.part("prompt").focus();
    this.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  // --- What the page tells it -----------------------------------------------------------------------------------

  /** models: [{id, width, height}]; sizes are null until a worker has told them. */
  showModels(models) {
    this.#models = models;
    const select = this.part("model");
    const before = select.value;
    select.replaceChildren(...models.map((model) => new Option(model.id)));
    if (models.some((model) => model.id === before)) select.value = before;
    this.part("model-field").hidden = models.length < 2;
    this.#modelChosen();
  }

  showRemove(visible) {
    this.part("remove").hidden = !visible;
  }

  /** Redraw what changes all the time. */
  refresh() {
    const player = this.#player;
    if (!player) return;
    this.#saySeen();
    Object.assign(this.element.dataset, { next: this.#session.next, lost: this.#session.lost }); // for who looks inside
    const running = this.state === "live";
    const rate = running ? this.#figures.rate(player.shown) : null;
    this.part("fps").textContent = rate === null ? "–" : rate.toFixed(1);
    this.part("ahead").textContent = short(player.ahead);
    this.part("stalls").textContent = String(player.stalls);
    this.part("late").textContent = String(this.#figures.late);
    this.part("first").textContent = short(this.#figures.first);
    this.part("switch").textContent = short(this.#figures.change);
    this.part("clock").textContent = clock(player.position);
    this.#drawTimeline(player);
  }

  #drawTimeline(player) {
    const end = player.position + player.ahead;
    const parts = segments(player.marks, end);
    drawTimeline(this.part("timeline"), parts, { position: player.position, end });
    this.#listPrompts(parts, player.position);
    const words = parts.map((part) => `${this.#text(part.prompt)}, ${clock(part.from)} to ${clock(part.to)}`);
    this.part("timeline").setAttribute("aria-label", `Timeline: ${words.join("; ") || "nothing yet"}`);
  }

  /** The newest prompt first; a click takes its text again. */
  #listPrompts(parts, position) {
    const list = this.part("prompts");
    while (list.children.length < parts.length) list.prepend(this.#promptEntry());
    while (list.children.length > parts.length) list.firstElementChild.remove();
    parts.forEach((part, place) => {
      const entry = list.children[parts.length - 1 - place];
      const last = place === parts.length - 1;
      entry.classList.toggle("now", position >= part.from && (last || position < part.to));
      entry.querySelector(".number").textContent = String(part.prompt + 1);
      entry.querySelector(".range").textContent = `${clock(part.from)} – ${last && RUNNING.has(this.state) ? "now" : clock(part.to)}`;
      entry.querySelector(".again").textContent = this.#text(part.prompt);
    });
  }

  #promptEntry() {
    const entry = document.createElement("li");
    entry.innerHTML = '<span class="number"></span><span class="range"></span><button type="button" class="again"></button>';
    const again = entry.querySelector(".again");
    again.title = "Write this prompt again";
    again.addEventListener("click", () => this.#write(again.textContent));
    return entry;
  }

  #text(prompt) {
    return this.#session?.prompts[prompt]?.text ?? "";
  }

  // --- What the user does ---------------------------------------------------------------------------------------

  #listen() {
    const on = (name, event, act) => this.part(name).addEventListener(event, act);
    on("composer", "submit", (event) => (event.preventDefault(), this.#submit()));
    on("prompt", "keydown", (event) => this.#promptKey(event));
    on("pause", "click", () => this.#togglePause());
    on("stop", "click", () => this.#session?.stop());
    on("pick", "click", () => this.part("file").click());
    on("file", "change", () => this.#take(this.part("file").files[0]));
    on("detach", "click", () => this.#detach());
    on("remove", "click", () => this.#remove());
    on("dice", "click", () => (this.part("seed").value = String(Math.floor(Math.random() * 2 ** 32))));
    on("model", "change", () => this.#modelChosen());
    on("screen", "keydown", (event) => this.#screenKey(event));
    on("screen", "click", (event) => event.target.closest("button") || this.#togglePause());
    this.element.addEventListener("paste", (event) => this.#paste(event));
    for (const name of ["dragenter", "dragover", "dragleave", "drop"])
      this.element.addEventListener(name, (event) => this.#drag(event));
  }

  #promptKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    this.#submit();
  }

  #screenKey(event) {
    if (event.key !== " " || event.target !== this.part("screen")) return;
    event.preventDefault();
    this.#togglePause();
  }

  #drag(event) {
    event.preventDefault();
    this.element.classList.toggle("dragged", event.type === "dragenter" || event.type === "dragover");
    if (event.type === "drop" && event.dataTransfer.files.length) this.#take(event.dataTransfer.files[0]);
  }

  #paste(event) {
    const file = [...event.clipboardData.files].find(kindOf);
    if (!file) return;
    event.preventDefault();
    this.#take(file);
  }

  #write(text) {
    this.part("prompt").value = text;
    this.part("prompt").focus();
  }

  #submit() {
    const text = this.part("prompt").value.trim();
    if (!text) {
      this.part("prompt").focus();
      this.#notice("Write a prompt first.");
    } else if (this.#session && RUNNING.has(this.state)) this.#changePrompt(text);
    else if (!RUNNING.has(this.state)) this.#start(text);
  }

  #changePrompt(text) {
    this.#notice("");
    this.#figures.askPrompt();
    this.element.classList.add("turning");
    this.#session.prompt(text);
  }

  #togglePause() {
    if (this.state === "live") {
      this.#session.pause();
      this.#player?.pause();
      this.#figures.interrupt();
      this.#show("paused");
    } else if (this.state === "paused") {
      this.#session.resume();
      this.#player?.play();
      this.#figures.interrupt();
      this.#show("live");
    }
  }

  /** A file to begin from. A running stream goes on as it is; the file is for the next start. */
  async #take(file) {
    this.part("file").value = "";
    if (!file) return;
    this.#detach();
    const kind = kindOf(file);
    try {
      if (!kind) throw new Error(`${file.name} is neither a PNG, JPEG or WebP image nor a video.`);
      const video = kind === "video" ? await VideoFile.open(file) : null;
      const still = video ? await video.still() : URL.createObjectURL(file);
      this.#file = { kind, file, video, still };
    } catch (error) {
      this.#notice(error.message);
      return;
    }
    this.part("attachment").hidden = false;
    this.part("attachment").querySelector("img").src = this.#file.still;
    this.part("attachment-name").textContent = file.name;
    this.part("noise-field").hidden = kind !== "video";
    this.#notice(RUNNING.has(this.state) ? "The next start begins from this file." : "");
  }

  #detach() {
    if (!this.#file) return;
    URL.revokeObjectURL(this.#file.still);
    if (!RUNNING.has(this.state)) this.#file.video?.close();
    this.#file = null;
    this.part("attachment").hidden = true;
    this.part("noise-field").hidden = true;
  }

  #remove() {
    this.#session?.stop();
    this.#clear();
    this.element.remove();
    this.shared.removed(this);
  }

  // --- Its life -------------------------------------------------------------------------------------------------

  async #start(text) {
    this.#clear();
    this.#notice("");
    this.#show("connecting");
    let order;
    try {
      order = await this.#order(text);
    } catch (error) {
      this.#show("idle");
      this.#notice(error.message);
      return;
    }
    this.#figures = new Figures();
    this.#figures.ask();
    const hear = (name, detail) => session === this.#session && this.#hear(name, detail);
    const session = new Session(this.shared.address, this.shared.key(), order, hear);
    this.#session = session;
    session.open();
  }

  async #order(text) {
    const order = {
      prompt: text,
      seed: Number(this.part("seed").value) || 0,
      frame_rate: Number(this.part("speed").value),
      media: this.part("media").value,
      quality: QUALITY,
    };
    if (this.part("model").value) order.model = this.part("model").value;
    if (this.#file?.kind === "image") order.image = await imageBase64(this.#file.file);
    if (this.#file?.kind === "video") order.source = { noise: Number(this.part("noise").value), adaptive: false };
    return order;
  }

  #clear() {
    this.#sender?.stop();
    this.#player?.close();
    this.#session = this.#player = this.#sender = this.#format = null;
    this.part("welcome").hidden = false;
  }

  #hear(name, detail) {
    const hearers = {
      connecting: () => this.#show(detail.attempt ? "lost" : "connecting", detail.attempt ? "Connecting again" : ""),
      waiting: () => this.#lost(detail),
      queued: () => this.#queued(detail),
      ready: () => this.#ready(detail),
      media: () => this.#media(detail),
      chunk: () => this.#chunk(detail),
      prompt: () => this.#turned(detail),
      moved: () => this.#moved(detail),
      due: () => this.#sender?.due(detail),
      error: () => detail.recoverable && this.#notice(detail.message),
      closed: () => this.#closed(detail),
    };
    hearers[name]?.();
  }

  #lost({ attempt, delay, message }) {
    this.#figures.interrupt();
    this.#show("lost", `Connection lost · try ${attempt} in ${short(delay / 1000)}`);
    if (message) this.#notice(message);
  }

  /** It was live before, unless it waited in the queue once more. */
  #moved({ seconds }) {
    this.#figures.interrupt();
    this.#showRunning();
    this.#notice(`Moved to another worker in ${short(seconds)}. No frame is lost.`, "calm");
  }

  #queued({ position }) {
    this.#figures.ask();
    this.#show("queued", position === 1 ? "Waiting · next in line" : `Waiting · number ${position} in line`);
  }

  #ready(format) {
    const first = this.#format === null;
    this.#format = format;
    if (!first) {
      this.#notice("");
      this.#showRunning();
      return;
    }
    this.#shape(format);
    this.part("screen").classList.toggle("crisp", format.width <= CRISP);
    this.#player = this.#newPlayer(format);
    this.#player.failed = (error) => this.#broken(error);
    const failed = (error) => this.#broken(error);
    if (this.#file?.video) this.#sender = new FrameSender(this.#file.video, this.#session, format, failed);
    this.#show("starting");
  }

  #newPlayer({ media, mime, frame_rate: frameRate }) {
    if (media === "jpeg") return new JpegPlayer(this.element.querySelector(".screen > canvas"), mime, frameRate);
    return new Mp4Player(this.element.querySelector("video"), mime, frameRate);
  }

  #media(media) {
    this.#player.add(media);
    if (!media.frames) return;
    this.#unseen = true;
    this.#figures.media(media.first, media.frames);
    if (this.state !== "starting") return;
    this.part("welcome").hidden = true;
    this.#show("live");
  }

  #chunk(record) {
    this.#figures.chunk(record, this.#format.frame_rate);
    this.#saySeen();
    drawGaps(this.part("chart"), this.#figures.gaps);
    const words = `median ${short(this.#figures.gap(0.5))} · 95 % ${short(this.#figures.gap(0.95))}`;
    this.part("gap-text").textContent = words;
    this.part("chart").setAttribute("aria-label", `Chunk gaps: ${words}`);
  }

  /** The server goes on when it hears what came, and that is not said while the player has plenty. */
  #saySeen() {
    if (!this.#unseen || this.#player.ahead > FULL) return;
    this.#unseen = false;
    this.#session.seen();
  }

  #turned(record) {
    this.element.classList.remove("turning");
    this.#figures.promptFrom(record.frame);
    this.#player?.cutFrom(record.frame);
  }

  #broken(error) {
    this.#session?.stop();
    this.#show("error");
    this.#notice(`The picture stopped: ${error.message}.`);
  }

  #closed({ reason, message, code }) {
    this.#sender?.stop();
    this.element.classList.remove("turning");
    if (reason === "stopped") this.#player?.pause();
    else this.#player?.end();
    this.#show(reason);
    if (code === "wrong_key") this.shared.askKey();
    this.#notice(explain(reason, message, code));
  }

  // --- What it shows --------------------------------------------------------------------------------------------

  #show(state, text = "") {
    this.state = state;
    this.element.dataset.state = state;
    this.part("chip-text").textContent = text || STATES[state];
    const running = RUNNING.has(state);
    this.part("go").textContent = running ? "Change" : "Play";
    this.part("stop").disabled = !running;
    this.part("pause").disabled = state !== "live" && state !== "paused";
    this.part("pause").textContent = state === "paused" ? "Resume" : "Pause";
  }

  /** The stream has a worker (again). */
  #showRunning() {
    const begun = this.#figures.first !== null;
    this.#show(this.#session.paused ? "paused" : begun ? "live" : "starting");
  }

  #notice(text, kind = "plain") {
    const notice = this.part("notice");
    notice.hidden = !text;
    notice.dataset.kind = kind;
    notice.textContent = text;
  }

  #modelChosen() {
    const model = this.#models.find((one) => one.id === this.part("model").value);
    if (model?.width && !this.#format) this.#shape(model);
    this.#showExamples();
  }

  /** The screen has the shape of the pictures. */
  #shape({ width, height }) {
    this.part("screen").style.setProperty("--shape", `${width} / ${height}`);
  }

  #showExamples() {
    const name = this.part("model").value;
    const texts = name.includes("tiny") || !name ? EXAMPLES.tiny : EXAMPLES.other;
    const entries = texts.map((text) => {
      const entry = document.createElement("li");
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
      button.addEventListener("click", () => this.#write(text));
      entry.append(button);
      return entry;
    });
    this.part("examples").replaceChildren(...entries);
  }
}

function explain(reason, message, code) {
  if (reason === "stopped") return "";
  if (reason === "busy") return `The server is full now. ${message ?? ""} Play tries again.`;
  if (reason === "ended") return message ? `The stream ended: ${message}.`.replace("..", ".") : "The stream ended.";
  if (code === "wrong_key") return "The server does not accept this key. Write the right one above, then play.";
  return message || "The server closed the stream without saying why.";
}
