// What readers without a mouse or a screen need and Material leaves out. It adds wrappers and buttons after the page has loaded.
document.querySelector(".md-search").ariaLabel = "Search the documentation";
document.querySelector(".md-search__options").ariaLabel = "Options of the search";
new MutationObserver(() => {
  for (const bar of document.querySelectorAll(".md-code__nav:not([aria-label])")) {
    bar.ariaLabel = `Code ${bar.querySelector("button")?.dataset.clipboardTarget?.match(/\d+/)?.[0] ?? ""}`;
  }
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) table.tabIndex = 0;
}).observe(document.body, { childList: true, subtree: true });
