"""The page of a two-alternative forced choice: one HTML file with its pictures, which works without a network.

A pair is seen for a number of seconds, then hidden, and the rater says which one it was. Answers stay in the browser
(localStorage) and are exported as JSON; an export that was broken off can be loaded to go on with it.
"""

import json
from collections.abc import Mapping
from typing import Any

from ldmcli.reports import html


def page_text(study: Mapping[str, Any]) -> str:
    """The page of a study as `ab.study_document` gives it."""
    data = json.dumps(study, separators=(",", ":")).replace("<", "\\u003c")  # nothing in it ends the script
    body = f'{_BODY}<script type="application/json" id="study">{data}</script>'
    return html.page("Which picture?", body, style=_STYLE, script=_SCRIPT)


_BODY = """
<section id="intro"><h1>Which picture?</h1>
<p class="lead">You see two pictures at a time<span id="brief"></span>. Then say which one it was.
<span id="middle">With them stands what both were made from.</span></p>
<p><label for="rater">Your name or number</label><br><input id="rater" maxlength="60" autocomplete="off"></p>
<p id="so-far" class="lead" aria-live="polite"></p>
<p class="row"><button id="start" class="main">Begin</button>
<button id="export" hidden>Export answers so far</button>
<button id="anew" hidden>Another rater</button></p>
<p class="note lead">Keys: ← and → choose, the space bar begins and pauses. You may close the page and come back.
To go on elsewhere, export your answers and load the file there:
<label class="file">load a file<input id="file" type="file" accept=".json,application/json"></label></p>
<p id="trouble" class="reason" role="alert" hidden></p></section>
<section id="trial" hidden><p class="bar"><progress id="progress" value="0"></progress><span id="count"></span>
<button id="pause">Pause</button></p>
<p id="question" aria-live="polite"></p><p id="words"></p>
<div class="pair"><button class="side" id="left"><img alt="left picture"><span>←<br>left</span></button>
<div class="given" id="given"><img alt="what both were made from"></div>
<button class="side" id="right"><img alt="right picture"><span>→<br>right</span></button></div></section>
<section id="end" hidden><h1>Thank you</h1><p class="lead">That was all. Export your answers and send the file back.</p>
<p class="row"><button id="export-all" class="main">Export answers</button>
<button id="next-rater">Another rater</button></p></section>
"""

_STYLE = """
[hidden]{display:none!important}
main{padding-top:20px}section{margin-top:0}
button,input{font:inherit;color:inherit;background:var(--panel);border:1px solid var(--line);border-radius:8px;
padding:10px 16px;min-height:44px}
input#rater{width:min(100%,320px);margin-top:6px}
button{cursor:pointer}button.main{background:var(--accent);border-color:var(--accent);color:var(--bg)}
button:disabled{cursor:default}button:focus-visible,input:focus-visible{outline:3px solid var(--accent)}
.row{display:flex;flex-wrap:wrap;gap:10px}
.file{text-decoration:underline;cursor:pointer;display:inline-block;padding:6px 0}
.file input{position:absolute;width:1px;height:1px;min-height:0;padding:0;opacity:0}
.file:focus-within{outline:3px solid var(--accent)}
.bar{display:flex;align-items:center;gap:12px;margin:0 0 8px;font-variant-numeric:tabular-nums;color:var(--soft)}
progress{flex:1;height:10px;accent-color:var(--accent)}
#question{font-size:1.15rem;font-weight:600;text-align:center;margin:10px 0}
#words{text-align:center;margin:0 0 10px;overflow-wrap:anywhere}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:14px;margin:0 auto;
max-width:calc((100vh - 230px)*2*var(--ratio,1))}
.pair.three{grid-template-columns:1fr 1fr 1fr;max-width:calc((100vh - 230px)*3*var(--ratio,1))}
.side,.given{position:relative;padding:0;aspect-ratio:var(--ratio,1);overflow:hidden;min-width:0;width:100%}
.given{border:1px dashed var(--line);border-radius:8px}
.pair img{width:100%;height:100%;object-fit:contain;display:block}
.side span{position:absolute;inset:0;display:none;align-items:center;justify-content:center;font-size:1.3rem}
.ask .pair.timed img,.wait .pair img{visibility:hidden}
.ask .pair.timed .side span{display:flex}
.ask .side{border:2px solid var(--accent)}
@media (max-width:700px){.pair,.pair.three{grid-template-columns:1fr 1fr;gap:10px;max-width:none}
.three .given{grid-column:1/3;grid-row:1;width:calc(50% - 5px);margin:0 auto}}
"""

_SCRIPT = r"""
"use strict";
const study = JSON.parse(document.getElementById("study").textContent);
const $ = (id) => document.getElementById(id);
const pair = document.querySelector(".pair"), place = "ldm-ab-" + study.page;
let answers = [], phase = "intro", since = 0, turn = 0;

function show(name, state) {
  phase = state || name;
  document.body.className = phase;
  for (const id of ["intro", "trial", "end"]) $(id).hidden = id !== name;
}
function trouble(text) { $("trouble").textContent = text; $("trouble").hidden = !text; }
function keep() {
  try { localStorage.setItem(place, JSON.stringify({rater: $("rater").value.trim(), answers})); }
  catch (error) { trouble("This browser keeps nothing: export your answers before you close the page."); }
}
function fits(found) {
  return Array.isArray(found.answers) && found.answers.length <= study.trials.length &&
    found.answers.every((one, k) => one.trial === k && study.trials[k].tokens.includes(one.chosen));
}
function take(found) { answers = found.answers; $("rater").value = found.rater || ""; intro(); }
function intro() {
  const done = answers.length, all = study.trials.length;
  $("so-far").textContent = done ? `${done} of ${all} answered.` : `${all} pairs, about ${study.minutes} min.`;
  $("start").textContent = done ? "Go on" : "Begin";
  $("export").hidden = $("anew").hidden = !done;
  $("rater").readOnly = done > 0;
  show("intro");
}
function begin() {
  if (!$("rater").value.trim()) { trouble("Please give a name or number first."); $("rater").focus(); return; }
  trouble(""); keep(); next();
}
function picture(holder, number) {
  const image = holder.querySelector("img");
  image.src = study.images[number];
  return image.decode().catch(() => {}).then(() => image.classList.toggle("pixels", image.naturalWidth < 128));
}
function next() {
  const number = answers.length, trial = study.trials[number], mine = ++turn;
  $("progress").max = study.trials.length;
  $("progress").value = number;
  if (!trial) { show("end"); return; }
  $("count").textContent = `${number + 1} of ${study.trials.length}`;
  $("question").textContent = study.questions[trial.question];
  const shown = typeof trial.given === "number";
  $("words").textContent = shown ? "" : trial.given || "";
  $("given").hidden = !shown;
  pair.classList.toggle("three", shown);
  $("left").disabled = $("right").disabled = true;
  show("trial", "wait");
  const ready = [picture($("left"), trial.pictures[0]), picture($("right"), trial.pictures[1])];
  if (shown) ready.push(picture($("given"), trial.given));
  Promise.all(ready).then(() => {
    if (mine !== turn) return;
    const image = $("left").querySelector("img");
    pair.style.setProperty("--ratio", (image.naturalWidth || 1) / (image.naturalHeight || 1));
    if (!study.exposure) { ask(); return; }
    show("trial", "look");
    setTimeout(() => { if (mine === turn) ask(); }, study.exposure * 1000);
  });
}
function ask() {
  $("left").disabled = $("right").disabled = false;
  show("trial", "ask");
  since = performance.now();
}
function choose(side) {
  if (phase !== "ask") return;
  const trial = study.trials[answers.length], at = side === "left" ? 0 : 1;
  answers.push({trial: answers.length, unit: trial.unit, chosen: trial.tokens[at], other: trial.tokens[1 - at],
    side, seconds: Math.round(performance.now() - since) / 1000, at: new Date().toISOString()});
  keep(); next();
}
function pause() { turn++; intro(); }
function save() {
  const rater = $("rater").value.trim(), name = rater.replace(/[^A-Za-z0-9]+/g, "-") || "rater";
  const found = {kind: study.kind, page: study.page, salt: study.salt, methods: study.methods, rater,
    exposure: study.exposure, trials: study.trials.length, answers};
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(found, null, 1)], {type: "application/json"}));
  link.download = `answers-${name}-${study.page.slice(0, 8)}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
function anew() {
  if (!confirm("Forget these answers? Export them first.")) return;
  answers = []; $("rater").value = "";
  keep(); trouble(""); intro();
}
$("file").addEventListener("change", () => {
  const file = $("file").files[0];
  $("file").value = "";
  if (file) file.text().then((text) => {
    const found = JSON.parse(text);
    if (found.page !== study.page || !fits(found)) throw new Error("another page");
    if (found.answers.length < answers.length && !confirm("The file holds fewer answers than this page. Load it?"))
      return;
    take(found); keep(); trouble("");
  }).catch(() => trouble("That file holds no answers to this page."));
});
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key, typing = event.target.matches("input");
  if (key === "ArrowLeft" || key === "ArrowRight") {
    if (phase === "ask") { event.preventDefault(); choose(key === "ArrowLeft" ? "left" : "right"); }
  } else if ((key === " " && !typing && !event.target.matches("#intro button,#end button")) ||
             (key === "Enter" && event.target.id === "rater")) {
    event.preventDefault();
    if (phase === "intro") begin();
    else if (phase !== "end") pause();
  }
});
for (const side of ["left", "right"]) $(side).addEventListener("click", () => choose(side));
for (const [id, act] of [["start", begin], ["pause", pause], ["export", save], ["export-all", save], ["anew", anew],
  ["next-rater", anew]]) $(id).addEventListener("click", act);
pair.classList.toggle("timed", study.exposure > 0);
$("brief").textContent = study.exposure ? ` for ${study.exposure} s, which then are hidden` : "";
$("middle").hidden = !study.trials.some((trial) => trial.given !== null);
try {
  const found = JSON.parse(localStorage.getItem(place));
  if (found && fits(found)) take(found); else intro();
} catch (error) { intro(); }
"""
