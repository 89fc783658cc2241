// Sliders over frames, and what they move in the overlays.
"use strict";
const report = {};

// Calls `show(index)` whenever the slider of `box` moves; its button plays the frames in a loop.
report.connectSlider = (box, names, show) => {
  const range = box.querySelector("input");
  const button = box.querySelector("button.play");
  const output = box.querySelector("output");
  let timer = null;

  function moveTo(index) {
    range.value = index;
    range.setAttribute("aria-valuetext", names[index]);
    output.textContent = names[index];
    show(index);
  }
  function stop() {
    clearInterval(timer);
    timer = null;
    button.setAttribute("aria-pressed", "false");
    button.textContent = "Play";
  }
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    timer = setInterval(() => moveTo((Number(range.value) + 1) % names.length), 200);
    button.setAttribute("aria-pressed", "true");
    button.textContent = "Pause";
  });
  range.addEventListener("input", () => moveTo(Number(range.value)));
  range.addEventListener("pointerdown", stop);
  range.addEventListener("keydown", stop);
  return { moveTo, value: () => Number(range.value), stop };
};

for (const figure of document.querySelectorAll("[data-overlay]")) {
  const { pictures, names } = JSON.parse(
    document.getElementById(`data-${figure.dataset.overlay}`).textContent,
  );
  const images = [...figure.querySelectorAll("img")];
  const titles = images.map((image) => image.alt.slice(0, image.alt.lastIndexOf(", ")));
  report.connectSlider(figure.querySelector(".slider"), names, (index) => {
    images.forEach((image, kind) => {
      image.src = pictures[kind][index];
      image.alt = `${titles[kind]}, ${names[index]}`;
    });
  });
}
