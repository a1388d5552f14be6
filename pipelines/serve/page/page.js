// The page around the streams: the server's state, the models, the access key, adding and removing streams.

import { StreamCard } from "./stream.js";

const KEY = "reelway.key";
const REFRESH = 250; // milliseconds between two redrawings of the figures
const STATUS = 5000;

const streams = document.getElementById("streams");
const server = document.querySelector(".server");
const keyForm = document.getElementById("key-form");
const keyToggle = document.querySelector(".key-toggle");
const cards = new Set();
let models = [];

const base = new URL("v1/", document.baseURI);

const shared = {
  address: new URL("stream", base).href.replace(/^http/, "ws"),
  key: () => sessionStorage.getItem(KEY) ?? "",
  askKey: () => showKey(true),
  removed: (card) => {
    cards.delete(card);
    if (!cards.size) addStream();
    arrange();
  },
};

class KeyRefused extends Error {}

async function ask(path) {
  const key = shared.key();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const answer = await fetch(new URL(path, base), { headers, cache: "no-store" }).catch(() => {
    throw new Error("The server cannot be reached");
  });
  if (answer.status === 401 || answer.status === 403)
    throw new KeyRefused(key ? "The server does not know this key" : "The server asks for a key");
  if (!answer.ok) throw new Error(`The server answers ${answer.status}`);
  return answer.json();
}

async function readModels() {
  models = (await ask("models")).data;
  for (const card of cards) card.showModels(models);
}

async function readStatus() {
  try {
    if (!models.length || models.some((model) => !model.width)) await readModels();
    showStatus(await ask("status"));
  } catch (error) {
    server.textContent = error.message;
    if (error instanceof KeyRefused) showKey(true);
  }
}

/** The status holds one fleet of workers per model. */
function showStatus(status) {
  const fleets = Object.values(status.models ?? status).filter((fleet) => Array.isArray(fleet.workers));
  const workers = fleets.flatMap((fleet) => fleet.workers).filter((worker) => worker.state === "ready");
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const words = (count, name) => `${count} ${name}${count === 1 ? "" : "s"}`;
  if (!workers.length) {
    server.textContent = fleets.find((fleet) => fleet.error)?.error ?? "The first worker is starting";
    return;
  }
  const parts = [words(workers.length, "worker"), words(sum(fleets.map((fleet) => fleet.streams)), "stream")];
  parts.push(`load ${Math.round((100 * sum(workers.map((worker) => worker.load))) / workers.length)} %`);
  const waiting = sum(fleets.map((fleet) => fleet.waiting));
  if (waiting) parts.push(`${waiting} waiting`);
  server.textContent = parts.join(" · ");
}

function showKey(visible) {
  keyForm.hidden = !visible;
  keyToggle.setAttribute("aria-expanded", String(visible));
  if (visible && document.activeElement === keyToggle) keyForm.elements.key.focus();
}

function addStream() {
  const card = new StreamCard(document.getElementById("stream-template"), shared);
  cards.add(card);
  card.showModels(models);
  streams.append(card.element);
  arrange();
  return card;
}

/** A lone stream has its controls beside the picture; several stand side by side. */
function arrange() {
  streams.dataset.count = String(cards.size);
  for (const card of cards) card.showRemove(cards.size > 1);
}

keyToggle.addEventListener("click", () => showKey(keyForm.hidden));
keyForm.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, keyForm.elements.key.value.trim());
  showKey(false);
  models = [];
  readStatus();
});
document.querySelector(".add").addEventListener("click", () => addStream().focus());
// A file that misses a stream must not replace the page.
for (const name of ["dragover", "drop"]) window.addEventListener(name, (event) => event.preventDefault());

keyForm.elements.key.value = shared.key();
addStream();
readStatus();
setInterval(() => document.hidden || readStatus(), STATUS);
setInterval(() => cards.forEach((card) => card.refresh()), REFRESH);
