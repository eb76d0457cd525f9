"use strict";
const $ = id => document.getElementById(id);
const root = $("vote"), texts = new Map(JSON.parse($("questions").textContent));
const names = [...texts.keys()];
const KEYS = {1: "left", 2: "right", 0: "tie", x: "bad", ArrowLeft: "left",
  ArrowRight: "right", ArrowDown: "tie", ArrowUp: "bad"};
// On a phone the left picture is the upper one.
const narrow = matchMedia("(max-width: 640px)");
let current = null, next = null, last = null, busy = false, refilling = null;

const say = (text, fault = false) => {
  $("status").textContent = text;
  $("status").className = fault ? "fault" : "";
};
const pause = ms => new Promise(resolve => setTimeout(resolve, ms));
// crypto.randomUUID exists on https and localhost only.
const newId = () => [...crypto.getRandomValues(new Uint8Array(16))]
  .map(x => x.toString(16).padStart(2, "0")).join("");

async function ask(path, body) {
  const options = body && {method: "POST", body: JSON.stringify(body),
    headers: {"Content-Type": "application/json"}};
  const answer = await fetch(path, options);
  const value = await answer.json();
  if (answer.ok) return value;
  throw Object.assign(new Error(value.error.message), {status: answer.status});
}

// The same request until it is answered: its id makes a repeat harmless.
async function insist(path, body) {
  for (let wait = 1000; ; wait = Math.min(2 * wait, 15000)) {
    try {
      const value = await ask(path, body);
      say("");
      return value;
    } catch (error) {
      if (error.status && error.status < 500) throw error;
      const reason = error.status ? error.message : "the server does not answer";
      say(`Not saved yet: ${reason}. Trying again…`, true);
      await pause(wait);
    }
  }
}

// --- what is on the page

const keyOf = pair => `${pair.pair}:${pair.again}`;
const frameOf = side => document.querySelector(`.frame[data-side=${side}]`);

function preload(pair) {
  pair.images = ["left", "right"].map(side => {
    const image = new Image(pair[side].width, pair[side].height);
    image.alt = `The ${side} picture`;
    image.classList.toggle("tiny", pair[side].width < 200);
    image.src = pair[side].url;
    return image;
  });
  pair.ready = Promise.all(pair.images.map(image => image.decode().catch(() => 0)));
  return pair;
}

function progress(state) {
  last = state.last;
  $("count").textContent = `${state.judged} of ${state.total}`;
  $("meter").style.width = `${100 * state.judged / Math.max(1, state.total)}%`;
  $("undo").disabled = !last;
}

function only(section) {
  for (const id of ["enter", "ballot", "over"]) $(id).hidden = id !== section;
  document.querySelector("header").hidden = section === "enter";
}

function showQuestion() {
  const name = current.questions[0], step = names.indexOf(name) + 1;
  $("question").textContent = texts.get(name);
  $("step").textContent = names.length > 1 ? `${step} of ${names.length}` : "";
}

function labels() {
  const words = narrow.matches ? ["Upper", "Lower"] : ["Left", "Right"];
  ["left", "right"].forEach((side, i) => {
    const button = document.querySelector(`[data-answer=${side}]`);
    button.firstChild.textContent = words[i];
  });
}

async function show(pair) {
  current = pair;
  if (!pair) return only("over");
  root.classList.add("waiting");
  await pair.ready;
  ["left", "right"].forEach((side, i) => frameOf(side).replaceChildren(pair.images[i]));
  $("prompt").textContent = pair.prompt;
  showQuestion();
  only("ballot");
  root.classList.remove("waiting");
}

async function fetchPairs(count) {
  const skip = [current, next].filter(Boolean).map(x => `&skip=${keyOf(x)}`).join("");
  const state = await insist(`/api/pairs?count=${count}${skip}`);
  progress(state);
  return state.pairs.map(preload);
}

async function begin() {
  $("who").textContent = root.dataset.voter;
  const pairs = await fetchPairs(2);
  next = pairs[1] || null;
  await show(pairs[0] || null);
}

// --- answers

async function vote(answer) {
  if (busy || !current || $("ballot").hidden) return;
  busy = true;
  const frame = frameOf(answer);
  frame?.classList.add("chosen");
  try {
    const {pair, again, questions} = current;
    const body = {id: newId(), pair, again, question: questions[0], answer};
    try {
      progress(await insist("/api/votes", body));  // it is on disk now
    } catch (error) {
      if (error.status !== 409) throw error;  // judged in another window: go on
    }
    current.questions = questions.slice(1);
    if (current.questions.length) showQuestion();
    else await advance();
  } catch (error) {
    say(`Not saved: ${error.message}. Reload the page.`, true);
  } finally {
    frame?.classList.remove("chosen");
    busy = false;
  }
}

async function advance() {
  if (!next) await refilling;
  if (next) {
    const pair = next;
    next = null;
    await show(pair);
    // In the background: the voter looks at a pair for longer than this takes.
    refilling = fetchPairs(1).then(([pair]) => { next ||= pair || null; })
      .catch(error => say(error.message, true));
    return;
  }
  current = null;
  const [pair] = await fetchPairs(1);
  await show(pair || null);
}

async function undo() {
  if (busy || !last) return;
  busy = true;
  try {
    const state = await insist("/api/undo", {id: last});
    progress(state);
    if (!state.pair) return;
    if (current && keyOf(current) !== keyOf(state.pair)) next = current;
    await show(preload(state.pair));
    say("The vote was taken back.");
  } catch (error) {
    say(error.message, true);
  } finally {
    busy = false;
  }
}

// --- the enlarged picture

function zoom(side) {
  const image = frameOf(side).firstChild?.cloneNode();
  if (!image) return;
  $("large").replaceChildren(image);
  $("side").textContent = document.querySelector(`[data-answer=${side}]`)
    .firstChild.textContent;
  if (!$("zoom").open) $("zoom").showModal();
}

document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.tagName === "INPUT") return;
  if ($("zoom").open) {
    if (event.key === "ArrowLeft") zoom("left");
    if (event.key === "ArrowRight") zoom("right");
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (key in KEYS && !$("ballot").hidden) { event.preventDefault(); vote(KEYS[key]); }
  else if (key === "u" || key === "Backspace") { event.preventDefault(); undo(); }
});
for (const button of document.querySelectorAll("[data-answer]"))
  button.onclick = () => vote(button.dataset.answer);
for (const frame of document.querySelectorAll(".frame"))
  frame.onclick = () => zoom(frame.dataset.side);
$("zoom").onclick = () => $("zoom").close();
$("zoom").onclose = () => $("large").replaceChildren();
$("undo").onclick = undo;
narrow.onchange = labels;
labels();
$("enter").onsubmit = async event => {
  event.preventDefault();
  try {
    const {voter} = await ask("/api/voter", {name: $("name").value.trim()});
    root.dataset.voter = voter;
    await begin();
  } catch (error) {
    say(error.message, true);
  }
};
if (root.dataset.voter) begin().catch(error => say(error.message, true));
else only("enter");
