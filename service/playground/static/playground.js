// Asks again whenever a setting changes, uploads images, and watches whether the server answers.
"use strict";

const RETRY = 2000, WATCH = 5000, DEBOUNCE = 150;  // milliseconds
const trouble = document.getElementById("trouble");
const announcement = document.getElementById("announcement");
const result = document.getElementById("result");
let form = document.getElementById("settings");
let file = null;       // an uploaded image; null: a sample
let fileUrl = "";
let asking = null;     // the AbortController of the call under way
let unanswered = false;  // whether the last question has no answer because the server was gone
let gone = !form;
let timer = 0;

function tell(sentence, detail = "", kind = "") {
  trouble.replaceChildren();
  trouble.dataset.kind = kind;
  if (!sentence) return;
  const first = document.createElement("p"), strong = document.createElement("b");
  strong.textContent = sentence;
  first.append(strong);
  if (kind === "gone") first.append(" This page tries again every 2 seconds.");
  if (kind === "gone" && document.getElementById("summary")) first.append(" The answer below is from before.");
  trouble.append(first);
  if (detail) {
    const more = document.createElement("p");
    more.className = "detail";
    more.textContent = detail;
    trouble.append(more);
  }
}

function lost(sentence, detail) {
  if (!gone || trouble.dataset.kind !== "gone") tell(sentence, detail, "gone");
  gone = true;
  result?.classList.add("stale");
}

function query() {
  const values = new URLSearchParams(new FormData(form));
  if (file) values.delete("sample");
  return values;
}

async function ask() {
  const values = query();
  if (!file && !values.has("sample")) return;
  asking?.abort();
  const own = asking = new AbortController();
  result.setAttribute("aria-busy", "true");
  try {
    const options = file ? { method: "POST", body: file } : {};
    const response = await fetch("result?" + values, { ...options, signal: own.signal });
    if (response.ok) {
      const html = await response.text();
      if (own !== asking) return;
      show(html, values);
    } else {
      const { sentence, detail } = await response.json();
      if (own !== asking) return;
      unanswered = response.status === 503;
      if (unanswered) lost(sentence, detail);
      else refused(sentence, detail);
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    unanswered = true;
    lost("The playground itself does not answer.", "It was stopped, or the network is gone.");
  } finally {
    if (own === asking) {
      asking = null;
      result.removeAttribute("aria-busy");
    }
  }
}

function show(html, values) {
  const more = form.querySelector("details")?.open;
  result.innerHTML = html;
  result.classList.remove("stale");
  unanswered = false;
  gone = false;
  tell("");
  if (file) document.getElementById("shown").src = fileUrl;
  else history.replaceState(null, "", "?" + values);
  if (more !== undefined) form.querySelector("details").open = more;
  announcement.textContent = document.getElementById("summary").textContent;
}

function refused(sentence, detail) {
  tell(sentence, detail, "refused");
  const note = document.createElement("p");
  note.className = "note";
  note.textContent = "No answer: see above.";
  result.replaceChildren(note);
  trouble.scrollIntoView({ block: "nearest" });
}

function soon() {
  clearTimeout(timer);
  timer = setTimeout(ask, DEBOUNCE);
}

function upload(chosen) {
  if (!chosen) return;
  file = chosen;
  URL.revokeObjectURL(fileUrl);
  fileUrl = URL.createObjectURL(file);
  for (const radio of form.querySelectorAll("input[name=sample]")) radio.checked = false;
  ask();
}

function refresh() {
  for (const output of form.querySelectorAll("output")) {
    output.textContent = Number(form.elements[output.htmlFor.value].value).toFixed(2);
  }
  form.elements.strength.disabled = !form.elements.profile.value;
  if (form.elements.budget) form.elements.budget.disabled = !form.elements.limited.checked;
}

function listen() {
  form.addEventListener("submit", event => { event.preventDefault(); ask(); });
  const changed = event => {
    if (event.target.id === "file") return;
    if (event.target.name === "sample") {
      file = null;
      document.getElementById("file").value = "";
    }
    refresh();
    soon();
  };
  form.addEventListener("input", changed);   // a slider as it moves
  form.addEventListener("change", changed);  // whatever a driver or an aid of the browser sets
  document.getElementById("file").addEventListener("change", event => upload(event.target.files[0]));
  refresh();
}

async function watch() {
  try {
    const state = await (await fetch("status")).json();
    if (!state.answers) lost(state.sentence, state.detail);
    else if (gone) await back(state);
    else if (state.bundle !== document.body.dataset.bundle) await renew(state);
  } catch {
    lost("The playground itself does not answer.", "It was stopped, or the network is gone.");
  }
  setTimeout(watch, gone ? RETRY : WATCH);
}

async function back(state) {
  if (!form) return location.reload();
  gone = false;
  tell("");
  result.classList.remove("stale");
  announcement.textContent = "The server answers again.";
  if (state.bundle !== document.body.dataset.bundle) await renew(state);
  else if (unanswered) ask();
}

// Another bundle is served: its profiles and its dial may be others.
async function renew(state) {
  const page = new DOMParser().parseFromString(await (await fetch("?" + query())).text(), "text/html");
  const fresh = page.getElementById("settings");
  if (!fresh) return;
  form.replaceWith(fresh);
  form = fresh;
  document.querySelector(".served").replaceWith(page.querySelector(".served"));
  document.body.dataset.bundle = state.bundle;
  listen();
  ask();
}

addEventListener("dragover", event => { event.preventDefault(); document.body.classList.add("dropping"); });
addEventListener("dragleave", event => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  if (form) upload(event.dataTransfer.files[0]);
});
addEventListener("paste", event => { if (form) upload(event.clipboardData.files[0]); });
if (gone) trouble.dataset.kind = "gone";
else listen();
// On a narrow screen the answer is below the form: while that is in sight, the summary stands at the lower edge.
if (result) {
  new IntersectionObserver(
    ([seen]) => document.body.classList.toggle("choosing", !seen.isIntersecting), { rootMargin: "0px 0px -120px" },
  ).observe(result);
}
setTimeout(watch, gone ? RETRY : WATCH);
