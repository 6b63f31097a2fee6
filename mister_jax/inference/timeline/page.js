"use strict";
// Shows the emotions of a recording while it plays. Data enters the page only as text, never as
// HTML.
(() => {
  const find = (id) => document.getElementById(id);
  const data = JSON.parse(find("timeline-data").textContent);
  const audio = find("audio");
  const numRows = data.start.length;
  const numClasses = data.classes.length;
  // Lines also differ by their dashes, for readers who cannot tell the colors apart.
  const DASHES = [[], [7, 3], [2, 3], [10, 3, 2, 3], [5, 5], [1, 2], [12, 4], [8, 2, 2, 2, 2, 2]];
  const MIN_SPAN = Math.min(2, data.duration);
  const START_SPAN = 120; // seconds shown at first
  const MAX_LANES = 4;

  let time = 0;
  let current = -1; // index of the utterance at `time`, or of the last one before it
  let [viewStart, viewEnd] = [0, Math.min(data.duration, START_SPAN)];
  let isShown = () => true; // speaker filter
  let colors = {};

  function make(name, className, text, attributes = {}) {
    const node = document.createElement(name);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    return node;
  }
  const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  const percent = (thousandths) => `${Math.round(thousandths / 10)}%`;
  const probability = (row, c) => data.probabilities[row * numClasses + c];
  const isUncertain = (row) => Boolean(data.uncertain && data.uncertain[row]);
  const emotionName = (row) => data.classes[data.emotion[row]] + (isUncertain(row) ? "?" : "");
  const emotionColor = (c) => `var(--emotion-${c})`;

  function clock(seconds, digits = 0) {
    const scale = 10 ** digits;
    const units = Math.floor(seconds * scale + 1e-6);
    const whole = Math.floor(units / scale);
    const two = (value) => String(value).padStart(2, "0");
    const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
    const text = hours ? `${hours}:${two(minutes)}` : String(minutes);
    const rest = digits ? `.${String(units % scale).padStart(digits, "0")}` : "";
    return `${text}:${two(whole % 60)}${rest}`;
  }

  // Rows are sorted by start. `reach` is the latest end of a row and all rows before it, so the
  // rows of an interval are found by bisection even if they overlap.
  const reach = [];
  data.end.forEach((end, row) => reach.push(Math.max(end, row ? reach[row - 1] : 0)));
  function firstAbove(values, limit) {
    let [low, high] = [0, values.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] > limit) high = middle;
      else low = middle + 1;
    }
    return low;
  }
  function rowsBetween(start, end) {
    const rows = [];
    for (let row = firstAbove(reach, start); row < numRows && data.start[row] < end; row++)
      if (data.end[row] > start && isShown(row)) rows.push(row);
    return rows;
  }
  function rowAt(seconds) {
    let row = firstAbove(data.start, seconds + 1e-3) - 1;
    const last = row;
    // If utterances overlap, the current utterance is the ongoing one that started last.
    for (; row >= 0 && reach[row] > seconds; row--)
      if (isShown(row) && data.end[row] > seconds) return row;
    for (row = last; row >= 0; row--) if (isShown(row)) return row;
    return -1;
  }

  // Lanes: one for each speaker, or as many as needed for overlapping utterances.
  const lanes = new Array(numRows).fill(0);
  let numLanes = 1;
  if (data.speakers.length && data.speakers.length <= MAX_LANES) {
    const hasUnknown = data.speaker.includes(-1);
    numLanes = data.speakers.length + hasUnknown;
    data.speaker.forEach((s, row) => { lanes[row] = s < 0 ? numLanes - 1 : s; });
  } else {
    const ends = [];
    for (let row = 0; row < numRows; row++) {
      let lane = ends.findIndex((end) => end <= data.start[row]);
      if (lane < 0) lane = Math.min(ends.length, MAX_LANES - 1);
      ends[lane] = data.end[row];
      lanes[row] = lane;
    }
    numLanes = ends.length;
  }

  // Waveform
  const bytes = Int8Array.from(atob(data.peaks), (character) => character.charCodeAt(0));
  const numBins = bytes.length / 2;
  function peaksBetween(start, end) {
    const first = Math.max(0, Math.floor(start / data.binSeconds));
    const stop = Math.min(numBins, Math.max(first + 1, Math.ceil(end / data.binSeconds)));
    let [low, high] = [0, 0];
    for (let bin = first; bin < stop; bin++) {
      low = Math.min(low, bytes[bin]);
      high = Math.max(high, bytes[numBins + bin]);
    }
    // Speech is mostly far below the peak, so the quiet parts are raised.
    return [-((-low / 127) ** .7), (high / 127) ** .7];
  }

  function readColors() {
    const style = getComputedStyle(document.documentElement);
    const read = (name) => style.getPropertyValue(name).trim();
    colors = { font: read("--sans"), emotions: data.classes.map((_, c) => read(`--emotion-${c}`)) };
    for (const name of ["ink", "muted", "rule", "paper", "wash", "silence", "accent"])
      colors[name] = read(`--${name}`);
  }

  function prepare(canvas) {
    const { width, height } = canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const [pixels, lines] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== pixels || canvas.height !== lines)
      [canvas.width, canvas.height] = [pixels, lines];
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = `12px ${colors.font}`;
    return { context, width, height };
  }

  function drawWaveform(context, width, top, height, start, end) {
    const scale = (end - start) / width;
    const rows = rowsBetween(start, end);
    let next = 0;
    let active = [];
    for (let x = 0; x < width; x++) {
      const [from, to] = [start + x * scale, start + (x + 1) * scale];
      while (next < rows.length && data.start[rows[next]] < to) active.push(rows[next++]);
      active = active.filter((row) => data.end[row] > from);
      const row = active[active.length - 1];
      // Without a waveform, utterances are blocks.
      const [low, high] = numBins ? peaksBetween(from, to) : row === undefined ? [0, 0] : [-.5, .5];
      context.fillStyle = row === undefined ? colors.silence : colors.emotions[data.emotion[row]];
      const middle = top + height / 2;
      const [above, below] = [Math.max(.5, high * height / 2), Math.max(.5, -low * height / 2)];
      context.fillRect(x, middle - above, 1, above + below);
    }
  }

  function drawPlayhead(context, x, height) {
    context.fillStyle = colors.ink;
    context.fillRect(x - 1, 0, 2, height);
  }

  // The overview is drawn once per size, because only the window and the playhead in it move.
  const background = document.createElement("canvas");
  let backgroundKey = "";
  function drawOverview() {
    const canvas = find("overview");
    const { context, width, height } = prepare(canvas);
    const key = [canvas.width, canvas.height, find("speaker").value, colors.paper].join();
    if (key !== backgroundKey) {
      drawWaveform(context, width, 3, height - 6, 0, data.duration);
      [background.width, background.height] = [canvas.width, canvas.height];
      background.getContext("2d").drawImage(canvas, 0, 0);
      backgroundKey = key;
    } else if (canvas.width && canvas.height) {
      context.drawImage(background, 0, 0, width, height);
    }
    const [left, right] = [viewStart, viewEnd].map((it) => it / data.duration * width);
    context.globalAlpha = .72;
    context.fillStyle = colors.paper;
    context.fillRect(0, 0, left, height);
    context.fillRect(right, 0, width - right, height);
    context.globalAlpha = 1;
    context.strokeStyle = colors.ink;
    context.lineWidth = 1.5;
    context.strokeRect(left + .75, .75, Math.max(3, right - left - 1.5), height - 1.5);
    drawPlayhead(context, time / data.duration * width, height);
  }

  function tickStep(span, width) {
    const steps = [.1, .2, .5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200];
    return steps.find((step) => step / span * width >= 70) || 14400;
  }

  function fit(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    const short = text.slice(0, 3);
    return context.measureText(short).width <= room ? short : "";
  }

  function drawDetail() {
    const { context, width, height } = prepare(find("detail"));
    const span = viewEnd - viewStart;
    const at = (seconds) => (seconds - viewStart) / span * width;
    const [lane, axis] = [20, 18];
    const waveHeight = height - axis - numLanes * lane - 4;
    context.fillStyle = colors.wash;
    context.fillRect(0, 0, width, waveHeight);
    drawWaveform(context, width, 2, waveHeight - 4, viewStart, viewEnd);
    context.textBaseline = "middle";
    for (const row of rowsBetween(viewStart, viewEnd)) {
      const left = Math.max(-2, at(data.start[row]));
      const right = Math.min(width + 2, at(data.end[row]));
      const top = waveHeight + 4 + lanes[row] * lane;
      const size = Math.max(1, right - left - 1);
      context.fillStyle = colors.emotions[data.emotion[row]];
      context.globalAlpha = isUncertain(row) ? .1 : .26;
      context.fillRect(left, top, size, lane - 3);
      context.globalAlpha = 1;
      context.fillRect(left, top, Math.min(3, size), lane - 3);
      if (row === current) {
        context.strokeStyle = colors.ink;
        context.lineWidth = 1.5;
        context.strokeRect(left + .75, top + .75, Math.max(1, size - 1.5), lane - 4.5);
      }
      const speaker = data.speakers[data.speaker[row]];
      const emotion = emotionName(row);
      const full = speaker === undefined ? emotion : `${emotion} · ${speaker}`;
      const name = context.measureText(full).width <= size - 10 ? full
        : fit(context, emotion, size - 10);
      context.fillStyle = colors.ink;
      if (name) context.fillText(name, left + 7, top + lane / 2 - 1);
    }
    const step = tickStep(span, width);
    context.fillStyle = colors.muted;
    for (let tick = Math.ceil(viewStart / step) * step; tick <= viewEnd; tick += step) {
      const x = at(tick);
      context.fillRect(x, height - axis, 1, 4);
      const label = clock(tick, step < 1 ? 1 : 0);
      if (x + context.measureText(label).width + 4 < width)
        context.fillText(label, x + 4, height - axis / 2 + 1);
    }
    drawPlayhead(context, at(time), height - axis);
  }

  // Abramowitz and Stegun 7.1.26; the error of 1e-7 is invisible.
  function normal(z) {
    const x = Math.abs(z) / Math.SQRT2;
    const t = 1 / (1 + .3275911 * x);
    const series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - .284496736) * t
      + .254829592) * t;
    const error = 1 - series * Math.exp(-x * x);
    return (1 + Math.sign(z) * error) / 2;
  }

  // Each utterance is weighted by the part of a Gaussian that it covers.
  function smooth(seconds, sigma) {
    const sums = new Array(numClasses).fill(0);
    let total = 0;
    for (const row of rowsBetween(seconds - 4 * sigma, seconds + 4 * sigma)) {
      const weight = normal((data.end[row] - seconds) / sigma)
        - normal((data.start[row] - seconds) / sigma);
      total += weight;
      for (let c = 0; c < numClasses; c++) sums[c] += weight * probability(row, c) / 1000;
    }
    return total < .02 ? null : sums.map((sum) => sum / total);
  }

  let curveKey = "";
  let points = [];
  function drawCurves() {
    const { context, width, height } = prepare(find("curves"));
    const span = viewEnd - viewStart;
    const sigma = Math.max(1, span / 40);
    const count = Math.max(20, Math.min(240, Math.round(width / 4)));
    const key = [viewStart, viewEnd, count, find("speaker").value].join();
    if (key !== curveKey) {
      points = [];
      for (let i = 0; i <= count; i++) points.push(smooth(viewStart + i / count * span, sigma));
      curveKey = key;
      find("smoothing").textContent = "Probability of each emotion over time, a mean weighted by "
        + `a Gaussian with a standard deviation of ${sigma.toFixed(1)} s.`;
    }
    const highest = points.reduce((top, it) => it ? Math.max(top, ...it) : top, 0);
    const limit = [.25, .5, 1].find((value) => value >= highest) || 1;
    const y = (value) => 6 + (1 - value / limit) * (height - 12);
    context.textBaseline = "bottom";
    for (const value of [0, limit / 2, limit]) {
      context.fillStyle = colors.rule;
      context.fillRect(0, Math.round(y(value)), width, 1);
      context.fillStyle = colors.muted;
      if (value < limit) context.fillText(`${100 * value}%`, 2, y(value) - 1);
    }
    context.lineWidth = 2;
    context.lineJoin = "round";
    for (let c = 0; c < numClasses; c++) {
      context.strokeStyle = colors.emotions[c];
      context.setLineDash(DASHES[c % DASHES.length]);
      context.beginPath();
      let isDrawing = false;
      points.forEach((values, i) => {
        if (values) context[isDrawing ? "lineTo" : "moveTo"](i / count * width, y(values[c]));
        isDrawing = values !== null;
      });
      context.stroke();
    }
    context.setLineDash([]);
    drawPlayhead(context, (time - viewStart) / span * width, height);
  }

  let isScheduled = false;
  function schedule() {
    if (isScheduled) return;
    isScheduled = true;
    requestAnimationFrame(() => {
      isScheduled = false;
      drawOverview();
      drawDetail();
      drawCurves();
    });
  }

  function setView(start, span) {
    span = Math.min(data.duration, Math.max(MIN_SPAN, span));
    viewStart = Math.max(0, Math.min(data.duration - span, start));
    viewEnd = viewStart + span;
    schedule();
  }
  function zoom(factor, center = time >= viewStart && time <= viewEnd ? time
    : (viewStart + viewEnd) / 2) {
    const span = (viewEnd - viewStart) * factor;
    setView(center - (center - viewStart) * factor, span);
  }

  // Position
  const tableRows = [];
  function setTime(seconds, { follow = true } = {}) {
    time = Math.max(0, Math.min(data.duration, seconds));
    find("time").textContent = `${clock(time, 1)} / ${clock(data.duration)}`;
    if (follow && (time < viewStart || time > viewEnd)) {
      const span = viewEnd - viewStart;
      setView(time - span / 10, span);
    }
    const row = rowAt(time);
    if (row !== current) {
      if (tableRows[current]) tableRows[current].removeAttribute("aria-current");
      current = row;
      if (tableRows[row]) {
        tableRows[row].setAttribute("aria-current", "true");
        const [box, head] = [find("scroll"), 40];
        const { offsetTop: top, offsetHeight: height } = tableRows[row];
        if (top - head < box.scrollTop || top + height > box.scrollTop + box.clientHeight)
          box.scrollTop = top - head - box.clientHeight / 4;
      }
      showCurrent();
    }
    schedule();
  }
  function seek(seconds) {
    setTime(seconds);
    if (audio.readyState > 0) audio.currentTime = time;
  }
  function step(direction) {
    let row = current;
    // Before the first utterance, `current` is -1, so the next utterance is the first one.
    do row += direction; while (row >= 0 && row < numRows && !isShown(row));
    if (row >= 0 && row < numRows) {
      seek(data.start[row]);
      selectRow(row);
    }
  }
  // If several utterances start at the same time, `rowAt` finds only the last one.
  function selectRow(row) {
    if (row === current) return;
    if (tableRows[current]) tableRows[current].removeAttribute("aria-current");
    current = row;
    tableRows[row].setAttribute("aria-current", "true");
    showCurrent();
    schedule();
  }

  function bars(entries, table) {
    table.replaceChildren();
    const body = make("tbody");
    const highest = Math.max(1e-9, ...entries.map((entry) => entry.share));
    for (const { c, share, text } of entries) {
      const line = make("tr");
      const head = make("th", "", undefined, { scope: "row" });
      const swatch = make("span", "swatch");
      swatch.style.background = emotionColor(c);
      head.append(swatch, data.classes[c]);
      const cell = make("td");
      const bar = make("span", "bar");
      bar.style.background = emotionColor(c);
      bar.style.width = `${100 * share / highest}%`;
      bar.hidden = share === 0;
      cell.append(bar);
      line.append(head, cell, make("td", "", text));
      body.append(line);
    }
    table.append(body);
  }

  function votes(row) {
    return data.experts.map((name, e) => {
      const vote = data.votes[e][row];
      return `${name} ${vote < 0 ? "–" : data.classes[vote]}`;
    });
  }
  function gateBar(row) {
    const weights = data.gate.map((column) => column[row]);
    const names = data.experts.map((name, e) => `${name} ${percent(weights[e])}`);
    const bar = make("span", "gate", undefined, {
      role: "img", "aria-label": `gate: ${names.join(", ")}`, title: `gate: ${names.join(", ")}`,
    });
    let position = 0;
    const stops = weights.map((weight, e) => {
      const from = position;
      position += weight / 10;
      return `var(--${data.experts[e]}, var(--muted)) ${from}% ${position}%`;
    });
    bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    return bar;
  }

  function showCurrent() {
    const box = find("current");
    box.replaceChildren();
    if (current < 0) {
      box.append(make("p", "meta", "Before the first utterance"));
      return;
    }
    const speaker = data.speaker[current];
    box.append(make("p", "meta", `${clock(data.start[current], 1)} to ${clock(data.end[current], 1)}`
      + (speaker < 0 ? "" : `, ${data.speakers[speaker]}`)));
    if (data.text[current]) box.append(make("p", "quote", data.text[current]));
    const label = data.label[current];
    const remarks = [...isUncertain(current) ? ["uncertain"] : [],
      ...label ? [`annotated: ${label}`] : []];
    box.append(make("p", "verdict",
      emotionName(current) + (remarks.length ? ` (${remarks.join(", ")})` : "")));
    const table = make("table", "bars", undefined, { "aria-label": "Probabilities" });
    bars(data.classes.map((_, c) => ({
      c, share: probability(current, c), text: percent(probability(current, c)),
    })), table);
    box.append(table);
    if (data.gate) {
      const gate = make("p", "meta");
      gate.append(gateBar(current), data.experts.map(
        (name, e) => `${name} ${percent(data.gate[e][current])}`).join(" · "));
      box.append(gate);
    }
    for (const note of data.notes[current]) box.append(make("p", "meta", `Note: ${note}`));
  }

  function showTotals() {
    const seconds = new Array(numClasses).fill(0);
    for (let row = 0; row < numRows; row++)
      if (isShown(row)) seconds[data.emotion[row]] += data.end[row] - data.start[row];
    const total = seconds.reduce((sum, it) => sum + it, 0) || 1;
    const entries = seconds.map((share, c) => ({
      c, share, text: `${clock(share, share < 60 ? 1 : 0)} (${Math.round(100 * share / total)}%)`,
    }));
    bars(entries.sort((a, b) => b.share - a.share), find("totals"));
  }

  function buildTable() {
    const columns = ["Time", ...data.speakers.length ? ["Speaker"] : [], "Emotion", "Text",
      ...data.experts.length ? [data.gate ? "Experts and gate" : "Experts"] : []];
    for (const name of columns)
      find("head").append(make("th", "", name, { scope: "col", role: "columnheader" }));
    const cell = (className, text) => make("td", className, text, { role: "cell" });
    const fragment = document.createDocumentFragment();
    for (let row = 0; row < numRows; row++) {
      const line = make("tr", "", undefined, { role: "row" });
      const when = cell("when");
      when.append(make("button", "", clock(data.start[row], 1), {
        type: "button", "aria-label": `Play from ${clock(data.start[row], 1)}`,
      }));
      line.append(when);
      if (data.speakers.length)
        line.append(cell("who", data.speaker[row] < 0 ? "" : data.speakers[data.speaker[row]]));
      const emotion = cell("emotion");
      const swatch = make("span", "swatch");
      swatch.style.background = emotionColor(data.emotion[row]);
      if (isUncertain(row)) swatch.style.opacity = .4;
      emotion.append(swatch, emotionName(row),
        ...isUncertain(row) ? [make("span", "hidden", " (uncertain)")] : [],
        make("span", "aside", ` ${percent(probability(row, data.emotion[row]))}`));
      line.append(emotion, cell("words", data.text[row]));
      if (data.experts.length) {
        const experts = cell("experts");
        if (data.gate) experts.append(gateBar(row));
        experts.append(make("span", "aside", votes(row).join(" · ")));
        line.append(experts);
      }
      line.addEventListener("click", () => {
        seek(data.start[row]);
        selectRow(row);
      });
      tableRows.push(line);
      fragment.append(line);
    }
    find("rows").append(fragment);
  }

  function buildLegend() {
    data.classes.forEach((name, c) => {
      const item = make("li");
      const line = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      line.setAttribute("viewBox", "0 0 30 10");
      line.setAttribute("aria-hidden", "true");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", "M0 5h30");
      path.setAttribute("stroke-width", "4");
      path.setAttribute("stroke-dasharray", DASHES[c % DASHES.length].join(" "));
      path.style.stroke = emotionColor(c);
      line.append(path);
      item.append(line, name);
      find("legend").append(item);
    });
    for (const name of data.gate ? data.experts : []) {
      const item = make("li");
      const swatch = make("span", "swatch");
      swatch.style.background = `var(--${name}, var(--muted))`;
      item.append(swatch, `${name} expert`);
      find("experts-legend").append(item);
    }
  }

  // Audio
  function showProblem() {
    find("problem").textContent = data.source === undefined
      ? "This browser cannot play the audio."
      : `The audio cannot be played: ${decodeURIComponent(data.source)} is missing, or this browser `
        + "does not play its format. With --embed_audio, the page contains the audio.";
    find("problem").hidden = false;
    find("play").disabled = true;
  }
  function toggle() {
    if (find("play").disabled) return;
    if (audio.paused) audio.play().catch((error) => {
      // A pause right after the start aborts playback.
      if (error.name !== "AbortError") showProblem();
    });
    else audio.pause();
  }
  function openAudio() {
    const embedded = find("audio-data").textContent;
    audio.addEventListener("error", showProblem);
    audio.addEventListener("loadedmetadata", () => { audio.currentTime = time; });
    const show = () => {
      find("play").textContent = audio.paused ? "Play" : "Pause";
      if (!audio.paused) requestAnimationFrame(tick);
    };
    const tick = () => {
      if (audio.paused) return;
      setTime(audio.currentTime);
      requestAnimationFrame(tick);
    };
    for (const name of ["play", "pause", "ended"]) audio.addEventListener(name, show);
    if (embedded) {
      const content = Uint8Array.from(atob(embedded), (character) => character.charCodeAt(0));
      audio.src = URL.createObjectURL(new Blob([content], { type: "audio/mpeg" }));
    } else if (data.source) {
      audio.src = data.source;
    } else {
      showProblem();
    }
  }

  function onCanvas(id, timeAt) {
    const canvas = find(id);
    const position = (event) => {
      const box = canvas.getBoundingClientRect();
      return timeAt((event.clientX - box.left) / box.width);
    };
    canvas.addEventListener("click", (event) => seek(position(event)));
    canvas.addEventListener("mousemove", (event) => {
      const seconds = position(event);
      const names = rowsBetween(seconds, seconds + 1e-6).map((row) =>
        `${emotionName(row)} ${percent(probability(row, data.emotion[row]))}`
        + (data.speaker[row] < 0 ? "" : `, ${data.speakers[data.speaker[row]]}`)
        + (data.text[row] ? `: ${data.text[row]}` : ""));
      canvas.title = [clock(seconds, 1), ...names].join("\n");
    });
    canvas.addEventListener("wheel", (event) => {
      const sideways = event.shiftKey ? event.deltaY : event.deltaX;
      if (event.ctrlKey || event.metaKey) {
        zoom(Math.exp(event.deltaY / 300), position(event));
      } else if (sideways) {
        const span = viewEnd - viewStart;
        setView(viewStart + sideways / canvas.clientWidth * span, span);
      } else {
        return;
      }
      event.preventDefault();
    }, { passive: false });
  }

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const name = event.target.localName;
    if (name === "select" || (name === "button" && event.key === " ")) return;
    // If the list of utterances has the focus, the arrow keys scroll the list.
    if (event.target === find("scroll") && event.key !== " ") return;
    const actions = {
      " ": toggle, "+": () => zoom(.5), "=": () => zoom(.5), "-": () => zoom(2),
      "0": () => setView(0, data.duration),
      ArrowDown: () => step(1), ArrowRight: () => step(1),
      ArrowUp: () => step(-1), ArrowLeft: () => step(-1),
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  find("facts").textContent = [clock(data.duration), plural(numRows, "utterance"),
    ...data.speakers.length ? [plural(data.speakers.length, "speaker")] : [],
    ...data.uncertain ? [`${data.uncertain.filter(Boolean).length} uncertain, marked with “?”`] : [],
    ...data.channel ? [data.channel] : []].join(" · ");
  if (data.speakers.length > 1) {
    find("speaker-filter").hidden = false;
    ["All", ...data.speakers].forEach((name, index) =>
      find("speaker").append(make("option", "", name, { value: String(index - 1) })));
    find("speaker").addEventListener("change", (event) => {
      const speaker = Number(event.target.value);
      isShown = speaker < 0 ? () => true : (row) => data.speaker[row] === speaker;
      tableRows.forEach((line, row) => { line.hidden = !isShown(row); });
      showTotals();
      setTime(time, { follow: false });
    });
  }
  find("play").addEventListener("click", toggle);
  find("previous").addEventListener("click", () => step(-1));
  find("next").addEventListener("click", () => step(1));
  find("speed").addEventListener("change", (event) => {
    audio.playbackRate = Number(event.target.value);
  });
  find("zoom-in").addEventListener("click", () => zoom(.5));
  find("zoom-out").addEventListener("click", () => zoom(2));
  find("zoom-all").addEventListener("click", () => setView(0, data.duration));
  onCanvas("overview", (share) => share * data.duration);
  onCanvas("detail", (share) => viewStart + share * (viewEnd - viewStart));
  onCanvas("curves", (share) => viewStart + share * (viewEnd - viewStart));
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", schedule);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readColors();
    schedule();
  });
  readColors();
  buildLegend();
  buildTable();
  showTotals();
  showCurrent();
  openAudio();
  setTime(0);
})();
