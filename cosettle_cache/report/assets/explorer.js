// The affinity explorer: which patch, which later frame, which map; everything else follows from these.
"use strict";
(() => {
    const { affinity, canvas: draw } = report;

  function load(source) {
    const image = new Image();
    image.src = source;
    return image.decode().then(() => image);
  }
  function place(patch, cols) {
    return `row ${Math.floor(patch / cols) + 1}, column ${(patch % cols) + 1}`;
  }
  function moved(from, to, cols) {
    const down = Math.floor(to / cols) - Math.floor(from / cols);
    const right = (to % cols) - (from % cols);
    const parts = [];
    if (down) parts.push(`${Math.abs(down)} ${down > 0 ? "down" : "up"}`);
    if (right) parts.push(`${Math.abs(right)} ${right > 0 ? "right" : "left"}`);
    return parts.length ? parts.join(", ") : "same place";
  }
  function short(value) {
    return Math.abs(value) < 0.001 ? value.toExponential(1) : value.toFixed(3);
  }

  async function connect(figure) {
    const data = JSON.parse(document.getElementById(`data-${figure.dataset.explorer}`).textContent);
    const { rows, cols, names } = data;
    const kinds = await Promise.all(data.kinds.map(affinity.unpack));
    const [pick, ...canvases] = figure.querySelectorAll("canvas");
    const [picked, ...readings] = figure.querySelectorAll(".views output");
    const choice = figure.querySelector("select");
    const cell = [pick, ...canvases].map((canvas) => draw.fit(canvas, rows, cols))[0];
    const images = await Promise.all(data.pictures.map(load));
    let patch = data.start;
    let frame = Math.min(1, images.length - 1);

    function showKind(kind, index) {
      const canvas = canvases[index];
      const cosines = affinity.cosines(kind, rows * cols, patch, frame);
      const isSoft = choice.value !== "cosine";
      const values = isSoft ? affinity.soften(cosines, Number(choice.value)) : cosines;
      const range = affinity.range(values);
      const nearest = affinity.nearest(kind, patch, frame);
      draw.frame(canvas, images[frame]);
      draw.map(canvas, cell, cols, values, range);
      nearest.forEach((item) => draw.outline(canvas, cell, cols, item.position, 2));
      nearest.forEach((item, rank) => draw.number(canvas, cell, cols, item.position, String(rank + 1)));
      const best = nearest[0];
      const said = isSoft
        ? `largest weight ${short(range[1])}, half of all in ${affinity.half(values)} patches`
        : `cosines from ${short(range[0])} to ${short(range[1])}`;
      readings[index].textContent =
        `nearest: ${place(best.position, cols)} (${moved(patch, best.position, cols)}), ` +
        `cosine ${short(best.cosine)}; ${said}`;
    }
    function show() {
      draw.frame(pick, images[0]);
      draw.outline(pick, cell, cols, patch, 3);
      picked.textContent = place(patch, cols);
      figure.dataset.patch = patch;
      if (images.length > 1) kinds.forEach(showKind);
    }
    function moveTo(row, col) {
      const clamp = (value, count) => Math.min(Math.max(value, 0), count - 1);
      patch = clamp(row, rows) * cols + clamp(col, cols);
      show();
    }
    function pointAt(event) {
      const box = pick.getBoundingClientRect();
      moveTo(
        Math.floor(((event.clientY - box.top) / box.height) * rows),
        Math.floor(((event.clientX - box.left) / box.width) * cols),
      );
    }

    const frames = report.connectSlider(figure.querySelector(".slider"), names, (index) => {
      frame = index + 1;
      show();
    });
    function stepFrame(by) {
      frames.stop();
      frames.moveTo(Math.min(Math.max(frames.value() + by, 0), names.length - 1));
    }
    pick.addEventListener("pointerdown", pointAt);
    pick.addEventListener("pointermove", (event) => { if (event.buttons) pointAt(event); });
    pick.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      const turn = { PageUp: -1, PageDown: 1 }[event.key];
      if (!step && !turn) return;
      event.preventDefault();
      if (step) moveTo(Math.floor(patch / cols) + step[0], (patch % cols) + step[1]);
      else if (names.length) stepFrame(turn);
    });
    choice.addEventListener("change", show);
    show();
    figure.dataset.ready = "yes";
  }
  document.querySelectorAll("[data-explorer]").forEach(connect);
})();
