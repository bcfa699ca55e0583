"""Runs c2c_ext's Hub verbs for `fake_hub.HubClient`: a line of JSON in, a line of JSON out."""

import json
import sys
import time
import traceback
import warnings
from typing import Any

from c2c_ext import CardInfo, Fuser

# huggingface_hub waits between its retries, in version 0.x 23 seconds in all.
time.sleep = lambda _: None


def pull(repo_id: str, save_to: str | None = None, **options: Any) -> str:
    fuser = Fuser.from_pretrained(repo_id, **options)
    if save_to is not None:
        fuser.save_pretrained(save_to)
    return type(fuser).__name__


def push(directory: str, repo_id: str, license: str | None = None, **options: Any) -> str:
    card = None if license is None else CardInfo(license=license)
    return Fuser.from_pretrained(directory).push_to_hub(repo_id, card=card, **options)


for line in sys.stdin:
    request = json.loads(line)
    verb = {"pull": pull, "push": push}[request.pop("verb")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            answer = {"result": verb(**request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": str(error), "types": [c.__name__ for c in type(error).__mro__]}
    answer["warnings"] = [str(w.message) for w in caught]
    print(json.dumps(answer), flush=True)
