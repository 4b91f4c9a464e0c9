// KaTeX draws the formulas that pymdownx.arithmatex has marked; without KaTeX their source stays readable.
document$.subscribe(({ body }) => {
  if (typeof renderMathInElement !== "function") return;
  renderMathInElement(body, {
    delimiters: [
      { left: "\\(", right: "\\)", display: false },
      { left: "\\[", right: "\\]", display: true },
    ],
  });
});
