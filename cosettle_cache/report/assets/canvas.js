// Drawing on the explorer's canvases: a frame, a map of values over it, the patches that matter.
"use strict";
report.canvas = (() => {
  // From dark violet over red to yellow, ever lighter: the order is seen without the colours.
  const RAMP = [[10, 7, 36], [66, 15, 104], [147, 38, 103], [221, 81, 58], [252, 165, 10], [252, 255, 164]];

  function ramp(share) {
    const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
    const index = Math.min(Math.floor(place), RAMP.length - 2);
    const part = place - index;
    return RAMP[index].map((value, channel) => Math.round(value + part * (RAMP[index + 1][channel] - value)));
  }

  // Gives the canvas a whole number of pixels per patch, and returns that number.
  function fit(canvas, rows, cols) {
    const cell = Math.max(8, Math.round(720 / cols));
    canvas.width = cols * cell;
    canvas.height = rows * cell;
    return cell;
  }

  function frame(canvas, image) {
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  }

  function map(canvas, cell, cols, values, [low, high]) {
    const context = canvas.getContext("2d");
    values.forEach((value, patch) => {
      const share = (value - low) / (high - low || 1);
      const [red, green, blue] = ramp(share);
      context.fillStyle = `rgb(${red} ${green} ${blue} / ${0.5 + 0.25 * share})`;
      context.fillRect((patch % cols) * cell, Math.floor(patch / cols) * cell, cell, cell);
    });
  }

  // An outline that is seen on dark and on light.
  function outline(canvas, cell, cols, patch, width) {
    const context = canvas.getContext("2d");
    const [x, y] = [(patch % cols) * cell, Math.floor(patch / cols) * cell];
    context.lineWidth = width + 3;
    context.strokeStyle = "#000";
    context.strokeRect(x, y, cell, cell);
    context.lineWidth = width;
    context.strokeStyle = "#fff";
    context.strokeRect(x, y, cell, cell);
  }

  function number(canvas, cell, cols, patch, text) {
    const context = canvas.getContext("2d");
    const [x, y] = [(patch % cols) * cell + cell / 2, Math.floor(patch / cols) * cell + cell / 2];
    context.font = `600 ${Math.max(11, Math.round(0.62 * cell))}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineWidth = 3;
    context.strokeStyle = "#000";
    context.strokeText(text, x, y);
    context.fillStyle = "#fff";
    context.fillText(text, x, y);
  }

  return { fit, frame, map, outline, number };
})();
