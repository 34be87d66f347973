// The messages of a chat, and their buttons.

import { copyText } from "./copy.js";

const ROLES = { user: "You", assistant: "Model" };

/** The messages. onEdit(text) returns the last question for editing; onAgain() asks it again. */
export class Transcript {
  #messages = [];

  constructor(log, { onEdit, onAgain }) {
    Object.assign(this, { log, onEdit, onAgain });
  }

  get length() {
    return this.#messages.length;
  }

  /** Messages of a request, with role and content. */
  get messages() {
    return this.#messages.map(({ role, node }) => ({ role, content: node.data }));
  }

  /** Add a message, and return it for `append`. */
  add(role, text = "") {
    const node = document.createTextNode(text);
    const article = element("article", "message");
    article.dataset.role = role;
    const content = element("p", "content");
    content.append(node);
    article.append(element("h3", "", ROLES[role]), content, element("div", "buttons"));
    this.log.append(article);
    const message = { role, node, article };
    this.#messages.push(message);
    this.#scroll();
    return message;
  }

  /** Append text to a message, which may have been removed meanwhile. */
  append(message, text) {
    const isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
    message.node.appendData(text);
    if (isAtEnd) this.#scroll();
  }

  /** Remove the last message, and return its text. */
  pop() {
    const { node, article } = this.#messages.pop();
    article.remove();
    return node.data;
  }

  /** Remove an answer at the end; with `isEmpty` only if it has no text. */
  dropAnswer({ isEmpty = false } = {}) {
    const last = this.#messages.at(-1);
    if (last?.role === "assistant" && !(isEmpty && last.node.data)) this.pop();
  }

  clear() {
    while (this.length) this.pop();
  }

  /** Show whether an answer is being written. */
  setBusy(isBusy) {
    this.log.ariaBusy = String(isBusy);
    const last = this.#messages.at(-1);
    const lastQuestion = this.#messages.findLast(({ role }) => role === "user");
    for (const message of this.#messages) {
      const buttons = [["Copy", (button) => copyText(message.node.data, button)]];
      if (message === lastQuestion) buttons.push(["Edit", () => this.#edit()]);
      if (message === last) {
        buttons.push([message.role === "user" ? "Ask again" : "Regenerate", this.onAgain]);
      }
      message.article.lastChild.replaceChildren(...(isBusy ? [] : buttons.map(makeButton)));
    }
    this.#scroll();
  }

  #edit() {
    this.dropAnswer();
    this.onEdit(this.pop());
  }

  #scroll() {
    this.log.scrollTop = this.log.scrollHeight;
  }
}

function makeButton([name, act]) {
  const button = element("button", "", name);
  button.type = "button";
  button.addEventListener("click", () => act(button));
  return button;
}

function element(kind, className, text = "") {
  const made = document.createElement(kind);
  if (className) made.className = className;
  made.textContent = text;
  return made;
}
