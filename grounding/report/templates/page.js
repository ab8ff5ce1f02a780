"use strict";
(() => {
  const root = document.documentElement, toggle = document.getElementById("theme"), THEMES = ["auto", "light", "dark"];
  const remember = { get: () => { try { return localStorage.getItem("egm-theme"); } catch { return null; } }, set: v => { try { localStorage.setItem("egm-theme", v); } catch { /* some browsers store nothing for pages opened as files */ } } };
  function paint(theme) {
    if (theme === "auto") delete root.dataset.theme; else root.dataset.theme = theme;
    toggle.textContent = "Theme: " + theme;
  }
  let theme = THEMES.includes(remember.get()) ? remember.get() : "auto";
  toggle.hidden = false; paint(theme);
  toggle.addEventListener("click", () => { theme = THEMES[(THEMES.indexOf(theme) + 1) % 3]; remember.set(theme); paint(theme); });

  const dialog = document.createElement("dialog"), close = document.createElement("button");
  close.type = "button"; close.textContent = "Close"; dialog.setAttribute("aria-label", "Enlarged answer"); document.body.append(dialog);
  function enlarge(card) {
    const copy = card.cloneNode(true), picture = copy.querySelector("image");
    for (const d of copy.querySelectorAll("details")) d.open = true;
    copy.querySelector("svg").removeAttribute("tabindex");
    if (!over && picture && /^picture\//.test(picture.getAttribute("href"))) picture.setAttribute("href", picture.getAttribute("href") + "?large=1");
    dialog.replaceChildren(copy, close); dialog.showModal(); close.focus();
  }
  const cardOf = e => { const s = e.target.closest(".card > svg"); return s && !dialog.contains(s) && s.closest(".card"); };
  document.addEventListener("click", e => { const c = cardOf(e); if (c) enlarge(c); else if (dialog.open && (e.target === dialog || e.target.closest("dialog button, dialog .card > svg"))) dialog.close(); });
  document.addEventListener("keydown", e => { const c = e.key === "Enter" && cardOf(e); if (c) { e.preventDefault(); enlarge(c); } });

  const parts = document.querySelectorAll("[data-part]"), pulse = document.getElementById("pulse"), runs = document.getElementById("runs");
  let revision = 0, chosen = null, asking = false, misses = 0, over = false;
  function put(part, text) {
    const place = document.querySelector(`[data-part="${part}"]`);
    if (!place) return;
    const opened = new Set([...place.querySelectorAll("details[open] > summary")].map(s => s.textContent)), scrolled = [...place.querySelectorAll(".wide")].map(w => w.scrollLeft);
    const FOCUS = "a, button, input, [tabindex]", focused = [...place.querySelectorAll(FOCUS)].indexOf(document.activeElement);
    place.innerHTML = text; // the server has escaped all text from outside, and the page's security policy runs no script in it
    for (const s of place.querySelectorAll("details > summary")) if (opened.has(s.textContent)) s.parentElement.open = true;
    place.querySelectorAll(".wide").forEach((w, i) => { w.scrollLeft = scrolled[i] || 0; });
    if (focused >= 0) (place.querySelectorAll(FOCUS)[focused] || document.body).focus({ preventScroll: true });
  }
  function turn(news) { // switch to other runs, which may lack parts that the previous ones had
    chosen = news.runs;
    for (const p of parts) if (!(p.dataset.part in news.parts)) put(p.dataset.part, "");
    document.querySelector("h1").textContent = chosen.join(" and ") || "No run yet";
    document.getElementById("report").search = new URLSearchParams(chosen.map(run => ["run", run]));
    for (const box of runs ? runs.elements : []) box.checked = chosen.includes(box.value);
  }
  async function ask() {
    if (asking || over || document.hidden || dialog.open) return;
    asking = true;
    try {
      const query = new URLSearchParams(location.search); query.set("since", revision);
      for (const run of chosen || []) query.append("shown", run);
      const reply = await fetch("news?" + query);
      if (!reply.ok) throw new Error(reply.status);
      const news = await reply.json();
      if (JSON.stringify(news.runs) !== JSON.stringify(chosen)) turn(news);
      for (const part in news.parts) put(part, news.parts[part]);
      revision = news.revision; misses = 0; over = news.over;
      pulse.textContent = news.pulse; document.title = news.title; pulse.className = "soft";
    } catch {
      misses++;
      if (misses > 1) { pulse.textContent = "The server does not answer. Start egm view again and open its new address."; pulse.className = "warn"; }
    } finally { asking = false; }
  }
  if (parts.length) {
    if (runs) runs.addEventListener("change", () => { location.search = new URLSearchParams(new FormData(runs)); });
    document.addEventListener("visibilitychange", ask); dialog.addEventListener("close", ask);
    setInterval(ask, 2000); ask();
  }

  const source = document.getElementById("data");
  if (!source) return;
  const data = JSON.parse(source.textContent), TITLES = JSON.parse(document.getElementById("titles").textContent);
  const form = document.getElementById("filter"), cards = document.getElementById("cards"), count = document.getElementById("count"), more = document.getElementById("more");
  const STEP = 24, N = data.sent.length, jobs = data.answers, CORRECT = data.kinds.indexOf("correct");
  const defaults = Object.fromEntries(new FormData(form));
  let lower = null, kept = [], shown = 0;

  const svg = (name, attributes) => { const e = document.createElementNS("http://www.w3.org/2000/svg", name); for (const k in attributes) e.setAttribute(k, attributes[k]); return e; };
  const el = (name, text, cls) => { const e = document.createElement(name); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
  const kindOf = (job, i) => job.kind[i] < 0 ? "missing" : data.kinds[job.kind[i]];
  const boxOf = (columns, i) => columns.map(c => c[i]);
  const name = k => TITLES.kinds[k] || k;

  function outline(parent, box, cls, title) {
    const at = { x: Math.min(box[0], box[2]), y: Math.min(box[1], box[3]), width: Math.abs(box[2] - box[0]), height: Math.abs(box[3] - box[1]) };
    const r = svg("rect", { ...at, class: cls });
    if (title) { const t = svg("title", {}); t.textContent = title; r.append(t); }
    parent.append(r);
  }
  function verdict(job, i) {
    const k = kindOf(job, i);
    return name(k) + (job.iou[i] < 0 ? "" : `, IoU ${(job.iou[i] / 1000).toFixed(2)}`);
  }
  function card(i) {
    const c = el("article", undefined, "card"), [w, h] = data.sizes[data.image[i]], sent = data.sent[i];
    const said = jobs.map((j, n) => (jobs.length > 1 ? data.names[n] + ": " : "") + verdict(j, i)).join("; ");
    const s = svg("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", tabindex: "0", "aria-label": `${sent}. True box ${boxOf(data.truth, i).join(", ")} of ${w} by ${h} pixels. ${said}` });
    const picture = data.pictures[data.image[i]];
    if (picture) s.append(svg("image", { href: picture, width: w, height: h }));
    else { const t = svg("text", { x: w / 2, y: h / 2, "font-size": w / 16 }); t.textContent = "picture not in this page"; s.append(svg("rect", { width: w, height: h, class: "rest" }), t); }
    const boxes = [[boxOf(data.truth, i), "truth", "true box"]];
    jobs.forEach((j, n) => { const b = boxOf(j.box, i); if (j.kind[i] >= 0 && Math.max(...b) >= 0) boxes.push([b, "guess g" + n % 2, data.names[n]]); });
    for (const [b] of boxes) outline(s, b, "halo"); // all of them first, so that none hides a box below
    for (const [b, cls, title] of boxes) outline(s, b, cls, title);
    const text = el("div");
    text.append(el("q", sent), el("div", `${TITLES.files[data.files[data.file[i]]] || data.files[data.file[i]]}, line ${data.line[i]}`, "soft"));
    jobs.forEach((j, n) => {
      if (j.kind[i] < 0) return;
      const line = el("div");
      if (jobs.length > 1) line.append(el("span", data.names[n] + ": ", "g" + n % 2));
      line.append(el("span", verdict(j, i), "kind " + kindOf(j, i)));
      if (j.tokens[i] >= 0) line.append(el("span", ` · ${j.tokens[i].toLocaleString("en")} tokens`, "soft"));
      text.append(line);
      if (j.texts[i] !== undefined) { const d = el("details"); d.append(el("summary", kindOf(j, i) === "failed" ? "reason" : "answer", "soft"), el("pre", j.texts[i])); text.append(d); }
    });
    c.append(s, text); return c;
  }
  function grow(focus) {
    const next = kept.slice(shown, shown + STEP).map(card);
    cards.append(...next); shown += next.length;
    more.hidden = shown >= kept.length; more.textContent = `Show ${Math.min(STEP, kept.length - shown)} more`;
    if (focus && next[0]) { next[0].tabIndex = -1; next[0].focus({ preventScroll: true }); }
  }
  const ORDERS = {
    worst: job => (a, b) => (job.iou[a] < 0) - (job.iou[b] < 0) || job.iou[a] - job.iou[b] || a - b,
    random: () => (a, b) => Math.imul(a + 1, 2654435761) - Math.imul(b + 1, 2654435761),
    long: job => (a, b) => job.tokens[b] - job.tokens[a] || a - b,
    file: () => (a, b) => a - b,
  };
  function show() {
    const f = Object.fromEntries(new FormData(form)), job = jobs[Number(f.job || 0)] || jobs[0], word = f.text.trim().toLowerCase();
    if (word && !lower) lower = data.sent.map(s => s.toLowerCase());
    const file = f.file ? data.files.indexOf(f.file) : -1, kind = f.kind ? data.kinds.indexOf(f.kind) : -1, wrong = f.kind === "not-correct";
    kept = [];
    for (let i = 0; i < N; i++) {
      if (job.kind[i] < 0 || file >= 0 && data.file[i] !== file) continue;
      if (wrong ? job.kind[i] === CORRECT : kind >= 0 && job.kind[i] !== kind) continue;
      if (f.flip) {
        const before = jobs[0].kind[i] === CORRECT, after = jobs[1].kind[i] === CORRECT;
        if (jobs[0].kind[i] < 0 || jobs[1].kind[i] < 0 || before === after || after !== (f.flip === "won")) continue;
      }
      if (f.pictured && data.pictures[data.image[i]] === undefined) continue;
      if (word && !lower[i].includes(word)) continue;
      kept.push(i);
    }
    kept.sort((ORDERS[f.order] || ORDERS.worst)(job));
    cards.replaceChildren(); shown = 0; grow(false);
    count.textContent = `${kept.length.toLocaleString("en")} of ${N.toLocaleString("en")}`;
    const changed = new URLSearchParams();
    for (const e of form.elements) if (e.name) {
      const value = e.type === "checkbox" ? (e.checked ? "on" : "off") : e.value, usual = e.type === "checkbox" ? (e.defaultChecked ? "on" : "off") : defaults[e.name];
      if (value !== usual) changed.set(e.name, value);
    }
    history.replaceState(null, "", "#" + changed);
  }
  function read() {
    form.reset();
    for (const [k, v] of new URLSearchParams(location.hash.slice(1))) {
      const e = form.elements.namedItem(k);
      if (!e) continue;
      if (e.type === "checkbox") e.checked = v !== "off";
      else { const before = e.value; e.value = v; if (e.value !== v) e.value = before; }
    }
    show();
  }
  let wait = 0;
  form.addEventListener("input", e => { clearTimeout(wait); wait = setTimeout(show, e.target.type === "search" ? 120 : 0); });
  form.addEventListener("submit", e => e.preventDefault());
  more.addEventListener("click", () => grow(true));
  document.addEventListener("click", e => { const a = e.target.closest("a.pick"); if (!a) return; e.preventDefault(); history.replaceState(null, "", a.getAttribute("href")); read(); form.scrollIntoView(); form.elements[0].focus({ preventScroll: true }); });
  window.addEventListener("hashchange", read);
  read();
})();
