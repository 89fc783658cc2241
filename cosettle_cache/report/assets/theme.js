// Light or dark: what the system says until the button is used, which the browser then remembers.
"use strict";
(() => {
  const button = document.getElementById("theme");
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const key = "cosettle-cache-report-theme";

  // Where a page opened from a file has no storage, the choice lasts as long as the page.
  function stored() {
    try { return localStorage.getItem(key); } catch { return null; }
  }
  function store(theme) {
    try { localStorage.setItem(key, theme); } catch { /* not remembered */ }
  }
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : system.matches;
  }
  function show() {
    button.setAttribute("aria-pressed", String(isDark()));
    document.dispatchEvent(new Event("themechange"));
  }

  const before = stored();
  if (before === "light" || before === "dark") root.dataset.theme = before;
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    store(root.dataset.theme);
    show();
  });
  system.addEventListener("change", show);
  show();
})();
