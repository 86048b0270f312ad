"""The page itself, by gradio: which boxes there are, and what each button does."""

import html
import os
import random
from collections.abc import Iterator
from dataclasses import asdict

# Before gradio is imported: it would tell its makers that it runs.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import fastapi
import gradio as gr

from corpus.messages import text_of
from engine.generation import Sampling
from web.replies import Models, stream
from web.texts import CHINESE, ENGLISH, standings_text, words_for
from web.votes import CHOICES, Comparison, Side, Votes, shuffle_sides

WORDS = gr.I18n(en=ENGLISH, **dict.fromkeys(("zh", "zh-CN", "zh-TW", "zh-HK"), CHINESE))
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
THEME = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
# A vote or a list is one short call: it waits for no reply that is being generated.
AT_ONCE = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
SEEDS = 2**31


def build_app(models: Models, votes: Votes, start: dict) -> fastapi.FastAPI:
    """The application to serve. Nothing on its page comes from another server.

    start: what the settings begin with, by the names of chat.py's options.
    """
    return gr.mount_gradio_app(
        fastapi.FastAPI(),
        build_page(models, votes, start),
        "",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        i18n=WORDS,
        theme=THEME,
    )


def build_page(models: Models, votes: Votes, start: dict) -> gr.Blocks:
    with gr.Blocks(title="LLM", analytics_enabled=False, fill_width=True) as blocks:
        names = list(models.folders())
        with gr.Accordion(WORDS("settings"), open=False):
            settings = _settings(start)
        with gr.Tab(WORDS("chat")):
            model = gr.Dropdown(names, value=names[0], label=WORDS("model"), elem_id="model")
            _chat_tab(models, [model, *settings])
        with gr.Tab(WORDS("compare")):
            tab = CompareTab(models, votes, names, settings)

        def refresh(*chosen: str) -> list[dict]:
            now = list(models.folders())
            if now == names:  # no update: another model may be chosen while this is under way
                return [gr.skip()] * len(chosen)
            gone = [{} if name in now else {"value": now[0]} for name in chosen]
            return [gr.update(choices=now, **change) for change in gone]

        choosers = [model, *tab.choosers]
        blocks.load(refresh, choosers, choosers, **AT_ONCE)
        blocks.load(tab.show_standings, None, tab.result, **AT_ONCE)
    return blocks


def _settings(start: dict) -> list[gr.components.Component]:
    """System message, what Sampling takes, and the seed, in this order."""

    def slider(name: str, lowest: float, highest: float, step: float) -> gr.Slider:
        value = start[name]
        ends = min(lowest, value), max(highest, value)
        return gr.Slider(*ends, value=value, step=step, label=WORDS(name), elem_id=name)

    system = gr.Textbox(start["system"] or "", label=WORDS("system"), elem_id="system")
    with gr.Row():
        numbers = [
            slider("max_new_tokens", 1, 2048, 1),
            slider("temperature", 0, 2, 0.05),
            slider("top_p", 0.05, 1, 0.05),
            slider("repetition_penalty", 0.5, 2, 0.05),
        ]
        seed = gr.Number(start["seed"], label=WORDS("seed"), precision=0, minimum=0, elem_id="seed")
    return [system, *numbers, seed]


def _chat_tab(models: Models, inputs: list):
    def answer(message: str, history: list[dict], name: str, system: str, *numbers) -> Iterator:
        *sampling, seed = numbers
        try:
            chat = models.chat(name, Sampling(*sampling), seed, system)
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
            return
        for turn in history:
            text = text_of(turn["content"], "content")
            if turn["role"] == "assistant":
                text = html.unescape(text)
            chat.messages.append({"role": turn["role"], "content": text})
        for known in stream(chat, message):
            yield html.escape(known, quote=False)
        if note := chat.what_was_left_out():
            gr.Warning(note)

    # A reply is shown as the text that it is. gr.Chatbot takes its messages for HTML also without
    # Markdown, so they are escaped.
    chatbot = gr.Chatbot(
        show_label=False,
        buttons=["copy", "copy_all"],
        render_markdown=False,
        latex_delimiters=[],
        feedback_options=None,
        height="60vh",
        elem_id="chat",
    )
    hint = WORDS("message")
    box = gr.Textbox(placeholder=hint, submit_btn=True, stop_btn=True, elem_id="message")
    gr.ChatInterface(
        answer,
        chatbot=chatbot,
        textbox=box,
        additional_inputs=inputs,
        editable=True,
        analytics_enabled=False,
        api_visibility="private",
    )


class CompareTab:
    """Two replies side by side, hidden names, a vote.

    choosers: the boxes with the two models.
    result: what is known after votes.
    """

    def __init__(self, models: Models, votes: Votes, names: list[str], settings: list):
        self.models, self.votes = models, votes
        self.comparison, self.mine = gr.State(), gr.State([])  # mine: ids of this page's votes
        with gr.Row():
            self.choosers = [
                gr.Dropdown(
                    names, value=name, label=WORDS(f"model_{side}"), elem_id=f"model_{side}"
                )
                for side, name in (("a", names[0]), ("b", names[min(1, len(names) - 1)]))
            ]
        question = gr.Textbox(
            label=WORDS("question"), info=WORDS("question_hint"), max_lines=8, elem_id="question"
        )
        with gr.Row():
            ask = gr.Button(WORDS("ask"), variant="primary", elem_id="ask")
            stop = gr.Button(WORDS("stop"), elem_id="stop_both")
        with gr.Row():
            self.replies = [self._reply_box(side) for side in ("left", "right")]
        with gr.Row(visible=False) as self.ballot:
            buttons = [gr.Button(WORDS(name), elem_id=f"vote_{name}") for name in CHOICES]
        self.result = gr.Textbox(
            label=WORDS("result"), lines=3, max_lines=12, interactive=False, elem_id="result"
        )
        undo = gr.Button(WORDS("undo"), size="sm", elem_id="undo")

        asking = gr.on(
            [ask.click, question.submit],
            self.ask,
            [*self.choosers, question, *settings],
            [*self.replies, self.comparison, self.ballot],
            show_progress="hidden",
            api_visibility="private",
        )
        stop.click(None, cancels=[asking], api_visibility="private")
        after = [*self.replies, self.comparison, self.ballot, self.mine, self.result]
        for name, button in zip(CHOICES, buttons, strict=True):
            inputs = [gr.State(name), self.comparison, *self.replies, self.mine]
            button.click(self.vote, inputs, after, **AT_ONCE)
        undo.click(self.undo, self.mine, [self.mine, self.result], **AT_ONCE)

    def _reply_box(self, side: str) -> gr.Textbox:
        return gr.Textbox(
            label=WORDS(f"{side}_reply"),
            lines=5,
            max_lines=24,
            interactive=False,
            buttons=["copy"],
            elem_id=f"{side}_reply",
        )

    def ask(self, one: str, other: str, question: str, system: str, *numbers) -> Iterator[tuple]:
        """Generate left, then right. Only when both are whole can there be a vote."""
        *sampling, seed = numbers
        seed = random.randrange(SEEDS) if seed is None else seed
        if not question.strip():
            return
        hidden, sides = gr.update(visible=False), []
        texts = ["", ""]
        # The second seed differs, so that one model can be compared with itself.
        for place, name in enumerate(shuffle_sides([one, other])):
            try:
                chat = self.models.chat(name, Sampling(*sampling), seed + place, system)
            except (ValueError, OSError) as error:
                gr.Warning(str(error))
                return
            for texts[place] in stream(chat, question):
                shown = [gr.update(value=text, interactive=False) for text in texts]
                yield *shown, None, hidden
            sides.append(Side(name, seed + place, texts[place]))
        messages = [*chat.start, {"role": "user", "content": question}]
        comparison = Comparison(messages, asdict(chat.sampling), left=sides[0], right=sides[1])
        shown = [gr.update(value=text, interactive=True) for text in texts]
        yield *shown, comparison, gr.update(visible=True)

    def vote(self, choice: str, comparison, left: str, right: str, mine: list, request: gr.Request):
        if comparison is None:  # a second click on the same comparison
            return [gr.skip()] * 6
        try:
            self.votes.add(comparison, choice, left, right)
        except (ValueError, OSError) as error:
            gr.Warning(str(error))
            return [gr.skip()] * 6
        words = words_of(request)
        names = {"left": comparison.left.model, "right": comparison.right.model}
        result = words["revealed"].format(**names) + "\n" + standings_text(self.votes, words)
        fixed = gr.update(interactive=False)
        return fixed, fixed, None, gr.update(visible=False), [*mine, comparison.id], result

    def undo(self, mine: list[str], request: gr.Request) -> tuple[list[str], str]:
        words = words_of(request)
        is_gone = bool(mine) and self.votes.undo(mine[-1])
        said = words["undone" if is_gone else "nothing_to_undo"]
        return mine[:-1], said + "\n" + standings_text(self.votes, words)

    def show_standings(self, request: gr.Request) -> str:
        return standings_text(self.votes, words_of(request))


def words_of(request: gr.Request) -> dict[str, str]:
    return words_for(request.headers.get("accept-language", ""))
