"""The three stages take their data from the Hub: a server on this machine stands for it."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Client, HubServer
from tiny import sentences

TEXTS = sentences(400)
PREPARE = """
from dpo_data import prepare_dpo_data
from sft_data import prepare_sft_data
from tokenizer import create_tokenizer
from train_data import prepare_data

tokenizer = create_tokenizer(model_path={folder!r})
prepare_data({folder!r}, "owner/web/*zh*", 64)
prepare_data({folder!r}, "owner/web/lines.jsonl", 64, max_dataset_bytes=6000)
prepare_sft_data(tokenizer, "owner/chat/sft", 64)
prepare_dpo_data(tokenizer, "owner/chat/dpo.jsonl", 64)
prepare_data({folder!r}, {{"owner/web/*zh*": 0.5, "owner/web/lines.jsonl": 0.5}}, 64)
"""


def lines(records) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def table(texts) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"content": texts, "score": [1.0] * len(texts)}), sink)
    return sink.getvalue().to_pybytes()


REPOSITORIES = {
    "owner/web": {
        "data/web_zh/1.parquet": table(TEXTS[:60]),
        "data/web_zh/2.parquet": table(TEXTS[60:100]),
        "data/web_en/1.parquet": table(TEXTS[100:]),
        "lines.jsonl": lines({"text": text} for text in TEXTS[100:]),
    },
    "owner/chat": {
        "sft/a.jsonl": lines({"input": f"问{i}", "target": t} for i, t in enumerate(TEXTS[:50])),
        "dpo.jsonl": lines(
            {"question": f"问{i}", "response_chosen": t, "response_rejected": t[::-1]}
            for i, t in enumerate(TEXTS[:30])
        ),
    },
}


@pytest.mark.slow
def test_every_stage_prepares_data_from_the_hub_and_again_without_it(tmp_path, tokenizer_folder):
    code = PREPARE.format(folder=str(tokenizer_folder))
    hub = HubServer()
    for name, files in REPOSITORIES.items():
        hub.commit(name, files)
    first = Client(hub, tmp_path).run("-c", code)
    hub.close()
    assert first.returncode == 0, first.stderr
    found = [line for line in first.stdout.splitlines() if line.startswith("Data owner")]
    assert "100 documents (none dropped)" in found[0]
    kept = int(found[1].split(" documents")[0].rpartition(" ")[2])
    assert 20 < kept < 300, "the limit ends the reading"
    assert "50 conversations" in found[2]
    assert "training + " in found[3] and "validation pairs" in found[3]
    assert "100 documents" not in found[4], "of the shorter one all, of the other as much"
    again = Client(hub, tmp_path).run("-c", code)  # the server is gone
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line.startswith("Data owner")] == found
