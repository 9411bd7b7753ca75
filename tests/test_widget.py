"""The completion widget in a real kernel: what its buttons send while text is being written."""

import queue
import time
from pathlib import Path

import nbformat
import pytest

manager = pytest.importorskip("jupyter_client.manager")
CHAPTER = Path(__file__).resolve().parent.parent / "chapters/13_generation.ipynb"
SETUP = """
import html, threading, time, torch
import ipywidgets as widgets
from IPython.display import display
from dsv3_mini.completion import Completer
from dsv3_mini.config import ModelConfig
from dsv3_mini.data import train_tokenizer
from dsv3_mini.model import DeepSeekV3
torch.manual_seed(0)
torch.set_num_threads(1)
tokenizer = train_tokenizer(["def get(self): return 1"], 270)
completer = Completer(DeepSeekV3(ModelConfig.preset("nano", eos_token_id=None)), tokenizer)
"""


def widget_source():
    """The chapter's cell, and the lines of colours that it needs, with a text too long to end by itself."""
    cells = [cell.source for cell in nbformat.read(CHAPTER, 4).cells if cell.cell_type == "code"]
    styles = next(cell for cell in cells if cell.startswith("COLORS = ")).split("settings = ")[0]
    widget = next(cell for cell in cells if cell.startswith("def completion_widget"))
    return styles + widget.replace("display(completion_widget(completer))", "")


class Page:
    """A browser's side of the widgets: their state as the kernel reports it, and clicks."""

    def __init__(self, client, code):
        self.client, self.states = client, {}
        client.execute(SETUP + widget_source() + code)
        self.wait(lambda: any("layout" in state and "children" in state for state in self.states.values()), 60)

    def wait(self, done, seconds=20):
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "the widget never got there"
            try:
                content = self.client.get_iopub_msg(timeout=0.5)["content"]
            except queue.Empty:
                continue
            assert "ename" not in content, content
            if "comm_id" in content and "state" in content["data"]:
                self.states.setdefault(content["comm_id"], {}).update(content["data"]["state"])

    def find(self, **values):
        return next(i for i, state in self.states.items() if all(state.get(k) == v for k, v in values.items()))

    def click(self, name):
        data = {"method": "custom", "content": {"event": "click"}}
        message = self.client.session.msg("comm_msg", {"comm_id": self.find(description=name), "data": data})
        self.client.shell_channel.send(message)

    @property
    def text(self):
        return self.states[self.find(_model_name="HTMLModel")]["value"]

    @property
    def writing(self):
        return self.states[self.find(description="write")]["disabled"]


@pytest.fixture(scope="module")
def client():
    kernel, client = manager.start_new_kernel(kernel_name="python3", cwd=str(CHAPTER.parent.parent))
    yield client
    client.stop_channels()
    kernel.shutdown_kernel(now=True)


def test_stop_gets_through_while_a_text_is_written(client):
    page = Page(client, "display(completion_widget(completer, max_new_tokens=1000))")
    for _ in range(2):  # and the button works again afterwards
        before = page.text
        page.click("write")
        page.wait(lambda: page.text != before and page.writing)  # noqa: B023
        page.click("stop")
        page.wait(lambda: not page.writing)
        assert 0 < page.text.count("<span") < 900


def test_a_text_ends_by_itself_between_prompt_and_suffix(client):
    page = Page(client, "display(completion_widget(completer, 'a < b', suffix='c > d', max_new_tokens=9))")
    page.click("write")
    page.wait(lambda: page.text and not page.writing)
    assert ">a &lt; b<span" in page.text and page.text.endswith("c &gt; d</pre>")


def test_a_request_that_cannot_be_served_is_told_on_the_page(client):
    page = Page(client, "display(completion_widget(completer, 'a', max_new_tokens=5000))")
    page.click("write")
    page.wait(lambda: page.text and not page.writing)
    assert "max_position_embeddings is 1024" in page.text
