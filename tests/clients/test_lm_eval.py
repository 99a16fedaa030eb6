"""lm-eval, local-completions: log-likelihoods of a task made here, from a local JSONL file, equal what generation says."""
import json
import os
import pathlib
import urllib.request

import lm_eval
from lm_eval.tasks import TaskManager

URL, MODEL, FOLDER = os.environ["URL"], os.environ["MODEL"], pathlib.Path(os.environ["SCRATCH"])
CONTEXTS = ["Once upon a time, there was a little", "Lily went to the park with her", "The dog saw a big red"]
N = 6  # tokens of a continuation

TASK = """task: urchin_local
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def post(path, body):
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def ids(text):
    return post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"]


def generated(context):
    """What the model itself goes on with: its text and the log-probability it gave it while generating."""
    choice = post("/v1/completions", {"model": MODEL, "prompt": ids(context), "max_tokens": N, "temperature": 0, "logprobs": 1})["choices"][0]
    return choice["text"], sum(choice["logprobs"]["token_logprobs"])


def test_loglikelihoods_are_those_of_generation():
    """The greedy continuation scores as it was generated, counts as greedy, and beats another context's."""
    own = [generated(c) for c in CONTEXTS]
    for c, (text, _) in zip(CONTEXTS, own):
        assert ids(c + text)[:len(ids(c))] == ids(c), "the test needs continuations that do not merge into their context"
    docs = [{"context": c, "choices": [own[i][0], " xyzzy 123"], "label": 0} for i, c in enumerate(CONTEXTS)]
    data = FOLDER / "docs.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in docs))
    (FOLDER / "urchin_local.yaml").write_text(TASK % data)
    results = lm_eval.simple_evaluate(
        model="local-completions", tasks=["urchin_local"], task_manager=TaskManager(include_path=str(FOLDER), include_defaults=False),
        model_args={"model": MODEL, "base_url": URL + "/v1/completions", "tokenizer_backend": "remote", "num_concurrent": 2,
                    "max_retries": 1, "tokenized_requests": True},
        log_samples=True, bootstrap_iters=0)
    assert results["results"]["urchin_local"]["acc,none"] == 1
    samples = sorted(results["samples"]["urchin_local"], key=lambda s: s["doc_id"])
    assert len(samples) == len(CONTEXTS)
    for sample, (text, logprob) in zip(samples, own):
        (score, greedy), (other, other_greedy) = (r[0] for r in sample["resps"])
        # Printed as decimals and added in another order; the model itself gives the same bits either way.
        assert abs(float(score) - logprob) < 1e-4, (text, score, logprob)
        assert str(greedy) == "True" and str(other_greedy) == "False" and float(other) < float(score)
