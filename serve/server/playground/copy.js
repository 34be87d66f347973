// Copying to the clipboard.

const SHOWN_MS = 1500;

/** Copy a text, and show it on the button and to screen readers. */
export async function copyText(text, button) {
  const words = (await isCopied(text)) ? "Copied" : "Not copied";
  document.getElementById("announcement").textContent = words;
  button.usual ??= button.textContent;
  button.textContent = words;
  clearTimeout(button.timer);
  button.timer = setTimeout(() => {
    button.textContent = button.usual;
    document.getElementById("announcement").textContent = "";
  }, SHOWN_MS);
}

// Browsers allow the clipboard only to pages from this machine or over TLS; the old way works for
// others.
async function isCopied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const focused = document.activeElement;
    const field = document.createElement("textarea");
    field.className = "unseen";
    field.value = text;
    document.body.append(field);
    field.select();
    const isDone = document.execCommand("copy");
    field.remove();
    focused?.focus({ preventScroll: true });
    return isDone;
  }
}
