// Reading values off the learning curves, by pointer or arrow keys; all panels of a run share the step.
"use strict";
(() => {
  function nearest(steps, wanted) {
    let best = 0;
    steps.forEach((step, index) => {
      if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = index;
    });
    return best;
  }
  function shown(value) {
    return value === null ? "not finite" : String(Number(value.toPrecision(4)));
  }
  function said(panel, step) {
    const parts = panel.series.map((series) => {
      const index = nearest(series.steps, step);
      const value = shown(series.values[index]);
      return panel.series.length > 1 ? `${series.name} ${value}` : value;
    });
    return `step ${Math.round(step)}: ${parts.join(", ")}`;
  }

  function connect(box) {
    const panels = JSON.parse(document.getElementById(`data-${box.dataset.curves}`).textContent);
    const figures = [...box.querySelectorAll("figure.panel")];

    function moveTo(step) {
      figures.forEach((figure, index) => {
        const steps = panels[index].series[0].steps;
        const at = steps[nearest(steps, step)];
        const plot = figure.querySelector(".plot");
        const [low, high] = [Number(plot.dataset.low), Number(plot.dataset.high)];
        const cursor = figure.querySelector(".cursor");
        const place = `${(100 * (at - low)) / (high - low)}%`;
        cursor.setAttribute("x1", place);
        cursor.setAttribute("x2", place);
        cursor.removeAttribute("hidden");
        figure.querySelector(".reading").textContent = said(panels[index], at);
      });
    }

    figures.forEach((figure, index) => {
      const plot = figure.querySelector(".plot");
      const steps = panels[index].series[0].steps;
      let place = steps.length - 1;
      plot.addEventListener("pointermove", (event) => {
        const box = plot.getBoundingClientRect();
        const [low, high] = [Number(plot.dataset.low), Number(plot.dataset.high)];
        const step = low + ((high - low) * (event.clientX - box.left)) / box.width;
        place = nearest(steps, step);
        moveTo(steps[place]);
      });
      plot.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10 }[event.key];
        const to = { Home: 0, End: steps.length - 1 }[event.key] ?? (by && place + by);
        if (to === undefined) return;
        event.preventDefault();
        place = Math.min(Math.max(to, 0), steps.length - 1);
        moveTo(steps[place]);
      });
    });
  }
  document.querySelectorAll("[data-curves]").forEach(connect);
})();
