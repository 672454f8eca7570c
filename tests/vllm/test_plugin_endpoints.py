"""The plug-in's HTTP routes, on a FastAPI app with a stand-in for the engine client."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="the plug-in runs inside vLLM")

import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from seer_servers.plugin import endpoints

VOCAB = 64


class FakeClient:
    """An engine client with one worker per report."""

    def __init__(self, reports, *, tokenizer_folder, tokenizer=None):
        self.reports = reports
        self.tokenizer = tokenizer
        model = SimpleNamespace(
            served_model_name=["tiny", "alias"],
            model="/models/tiny",
            tokenizer=str(tokenizer_folder),
            skip_tokenizer_init=False,
            max_model_len=2048,
            dtype=torch.bfloat16,
            logprobs_mode="raw_logprobs",
            max_logprobs=20,
            get_vocab_size=lambda: VOCAB,
        )
        self.vllm_config = SimpleNamespace(
            model_config=model,
            scheduler_config=SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=512),
            cache_config=SimpleNamespace(block_size=32, num_gpu_blocks=99),
            use_v2_model_runner=False,
            kv_transfer_config=None,
        )

    async def collective_rpc(self, method):
        assert method == "seer_support"
        if isinstance(self.reports, Exception):
            raise self.reports
        return self.reports

    async def get_weight_version(self):
        return "7"

    def get_tokenizer(self):
        return self.tokenizer


async def serve(client, *, key=None):
    app = FastAPI()
    plugin = endpoints.SeerEndpoints()
    plugin.attach_router(app)
    await plugin.init_state(client, app.state, SimpleNamespace())
    if key is not None:
        app.add_middleware(AuthenticationMiddleware, tokens=[key])
    return TestClient(app)


def report(*capabilities, boot_id="b0"):
    return {"boot_id": boot_id, "runner": "v1", "capabilities": list(capabilities)}


class TestEndpoints:
    async def test_info(self, tmp_path):
        reports = [report("position_seeds", "continuation"), report("continuation", boot_id="b1")]
        answer = (await serve(FakeClient(reports, tokenizer_folder=tmp_path))).get("/v1/seer/info").json()
        assert answer.pop("seer")
        assert answer == {
            "vllm": "0.32.0",
            "model": "tiny",
            "aliases": ["alias"],
            "root": "/models/tiny",
            "max_model_len": 2048,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 512,
            "block_size": 32,
            "num_blocks": 99,
            "dtype": "bfloat16",
            "vocab_size": VOCAB,
            "logprobs_mode": "raw_logprobs",
            "max_logprobs": 20,
            "weight_version": "7",
            "kv_pool": None,
            "boot_id": "b0",
            "runner": "v1",
            "capabilities": ["continuation"],
        }

    async def test_workers_without_the_plug_in_have_no_capability(self, tmp_path):
        client = FakeClient(RuntimeError("no attribute seer_support"), tokenizer_folder=tmp_path)
        answer = (await serve(client)).get("/v1/seer/info").json()
        assert answer["capabilities"] == []
        assert answer["boot_id"]

    async def test_tokenizer_file(self, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(b'{"a": 1}')
        answer = (await serve(FakeClient([report()], tokenizer_folder=tmp_path))).get("/v1/seer/tokenizer")
        assert (answer.status_code, answer.content) == (200, b'{"a": 1}')

    async def test_tokenizer_without_a_file(self, tmp_path):
        fast = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: '{"b": 2}'))
        client = FakeClient([report()], tokenizer_folder=tmp_path, tokenizer=fast)
        answer = (await serve(client)).get("/v1/seer/tokenizer")
        assert (answer.status_code, answer.json()) == (200, {"b": 2})

    async def test_a_slow_tokenizer_is_refused_in_words(self, tmp_path):
        client = FakeClient([report()], tokenizer_folder=tmp_path, tokenizer=SimpleNamespace())
        answer = (await serve(client)).get("/v1/seer/tokenizer")
        assert answer.status_code == 404
        assert "not a fast one" in answer.json()["detail"]

    async def test_vllm_s_api_key_guards_all_routes(self, tmp_path):
        guarded = await serve(FakeClient([report()], tokenizer_folder=tmp_path), key="secret")
        routes = ("info", "tokenizer", "kv/stats")
        assert [guarded.get(f"/v1/seer/{route}").status_code for route in routes] == [401, 401, 401]
        body = {"run": "r", "token_ids": [1], "cache_salt": "s"}
        posts = [guarded.post(f"/v1/seer/kv/{route}", json=body).status_code for route in ("flush", "lookup")]
        assert posts == [401, 401]
        assert guarded.get("/v1/seer/info", headers={"Authorization": "Bearer secret"}).status_code == 200

    async def test_an_engine_without_a_pool_says_so(self, tmp_path):
        client = await serve(FakeClient([report()], tokenizer_folder=tmp_path))
        assert client.get("/v1/seer/kv/stats").status_code == 404
        assert client.post("/v1/seer/kv/flush", json={"run": "r"}).status_code == 404

    async def test_a_server_without_an_engine_says_so(self):
        assert (await serve(None)).get("/v1/seer/info").status_code == 503
