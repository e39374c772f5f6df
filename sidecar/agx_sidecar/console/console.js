// Keeps a page current: asks for it again and changes only what is different, so that focus, scroll and selection stay.
"use strict";

const state = document.getElementById("state");
const pause = document.getElementById("pause");
let timer = 0;
let took = 0; // ms, the last answer

const view = () => document.getElementById("view");
const every = () => Number(view()?.dataset.every || 0);

function morph(old, fresh) {
  const isOpened = (name) => name === "open" && old.nodeName === "DETAILS"; // by the reader of the page
  for (const { name } of [...old.attributes]) if (!fresh.hasAttribute(name) && !isOpened(name)) old.removeAttribute(name);
  for (const { name, value } of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const wanted = new Set([...fresh.children].map((child) => child.id).filter(Boolean));
  for (const child of [...old.children]) if (child.id && !wanted.has(child.id)) child.remove();
  let at = old.firstChild;
  for (const next of [...fresh.childNodes]) {
    let same = at;
    if (next.id) same = [...old.children].find((child) => child.id === next.id);
    else if (at && at.id) same = null;
    if (!same || same.nodeName !== next.nodeName) {
      old.insertBefore(document.importNode(next, true), at);
      continue;
    }
    if (same === at) at = at.nextSibling;
    else old.insertBefore(same, at);
    if (same.nodeType === Node.ELEMENT_NODE) morph(same, next);
    else if (same.data !== next.data) same.data = next.data;
  }
  while (at) {
    const gone = at;
    at = at.nextSibling;
    gone.remove();
  }
}

// What grows at its end is kept there while nobody has scrolled away from it.
const boxes = () => [...document.querySelectorAll("[data-follow]")];
const toEnd = (box) => box.scrollTo(0, box.scrollHeight);

function show(text = "") {
  if (state.textContent !== text) state.textContent = text;
}

async function refresh() {
  const asked = performance.now();
  const was = view().dataset.state;
  const followed = boxes().filter((box) => box.scrollTop + box.clientHeight > box.scrollHeight - 8);
  try {
    const answer = await fetch(location.pathname + location.search, { credentials: "same-origin", redirect: "error" });
    if (answer.status === 401 || answer.status === 403) return location.reload();
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("view");
    if (!paused() && fresh) {
      morph(view(), fresh);
      fold();
      if (fresh.dataset.title) document.title = `${fresh.dataset.title} · agx`;
      const is = view().dataset.state;
      if (!answer.ok) show("Trouble; trying again");
      else if (is !== was) show(is); // the status is read out
      else if (state.textContent !== is) show("");
    }
  } catch {
    show("No connection; trying again");
  }
  took = performance.now() - asked;
  followed.forEach(toEnd);
  plan();
}

// A sub-agent's steps in the waterfall are shown unless its button has folded them.
const folded = new Set();

function fold() {
  let within = Infinity; // the depth of the folded sub-agent
  for (const row of document.querySelectorAll("[data-depth]")) {
    const depth = Number(row.dataset.depth);
    if (depth <= within) within = Infinity;
    row.hidden = depth > within;
    const button = row.querySelector("[data-fold]");
    const isFolded = button !== null && folded.has(button.dataset.fold);
    button?.setAttribute("aria-expanded", String(!isFolded));
    if (isFolded && within === Infinity) within = depth;
  }
}

document.addEventListener("click", ({ target }) => {
  const key = target.dataset.fold;
  if (key === undefined) return;
  if (!folded.delete(key)) folded.add(key);
  fold();
});

const paused = () => pause.getAttribute("aria-pressed") === "true";

function plan() {
  clearTimeout(timer);
  pause.hidden = every() === 0;
  if (every() && !paused() && !document.hidden) timer = setTimeout(refresh, Math.max(every(), 10 * took));
}

pause.addEventListener("click", () => {
  pause.setAttribute("aria-pressed", String(!paused()));
  show(paused() ? "Paused" : "");
  plan();
});
document.addEventListener("visibilitychange", plan);
document.addEventListener("submit", (event) => {
  const ask = event.target.dataset.ask;
  if (ask && !confirm(ask)) event.preventDefault();
});

// A link may carry the token after its #, which no browser sends: into no log, no proxy, no referrer.
function takeToken() {
  const login = document.getElementById("login");
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) history.replaceState(null, "", location.pathname + location.search);
  if (given && login && !document.getElementById("wrong")) {
    document.getElementById("token").value = given;
    login.submit();
  }
}
window.addEventListener("hashchange", takeToken); // pasted where the page that asks is open already
takeToken();
boxes().forEach(toEnd);
plan();
