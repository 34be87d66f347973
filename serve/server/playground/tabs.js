// Tabs of two kinds of requests; the address of the page remembers which is shown.

const tabs = [...document.querySelectorAll("[role=tab]")];

/** Return the name of the shown tab: "text" or "chat". */
export function shownTab() {
  return tabs.find((tab) => tab.ariaSelected === "true").id.replace("-tab", "");
}

/** Show the tab in the address. onChange() is called when another tab is shown. */
export function startTabs(onChange) {
  const show = (shown) => {
    for (const tab of tabs) {
      tab.ariaSelected = String(tab === shown);
      tab.tabIndex = tab === shown ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = tab !== shown;
    }
    onChange();
  };
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      show(tab);
      history.replaceState(null, "", `#${shownTab()}`);
    });
    tab.addEventListener("keydown", ({ key }) => {
      if (key !== "ArrowLeft" && key !== "ArrowRight") return;
      const other = tabs.find((candidate) => candidate !== tab);
      other.click();
      other.focus();
    });
  }
  show(tabs.find((tab) => `#${tab.id.replace("-tab", "")}` === location.hash) ?? tabs[0]);
}
