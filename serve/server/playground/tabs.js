// Two kinds of requests, one of which is shown; the page's address remembers which.

const tabs = [...document.querySelectorAll("[role=tab]")];

/** The name of the tab that is shown: "text" or "chat". */
export function shownTab() {
  return tabs.find((tab) => tab.ariaSelected === "true").id.replace("-tab", "");
}

/** Show what the address says. onChange() is called whenever another one is shown. */
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
      const other = tabs.find((its) => its !== tab);
      other.click();
      other.focus();
    });
  }
  show(tabs.find((tab) => `#${tab.id.replace("-tab", "")}` === location.hash) ?? tabs[0]);
}
