"""An answer that is a Python object: structured output with OpenAI's own client and a pydantic model.

pip install openai
python examples/openai_structured.py [BASE_URL] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
"""

import os
import sys
from typing import Annotated, Literal

from openai import OpenAI
from pydantic import BaseModel, Field

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLX_CLUSTER_URL", "http://127.0.0.1:8000")
model = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("MLX_CLUSTER_MODEL", "demo")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))


class Ticket(BaseModel):
    """Strings and lists are bounded: a small model would not stop otherwise."""

    title: Annotated[str, Field(max_length=30)]
    severity: Literal["low", "medium", "high"]
    nodes: Annotated[list[Literal["mini1", "mini2", "master"]], Field(max_length=3)]


answer = client.chat.completions.parse(
    model=model,
    messages=[{"role": "user", "content": "Write a ticket: mini2 does not answer."}],
    response_format=Ticket,
    temperature=0,
    max_tokens=120,
)
ticket = answer.choices[0].message.parsed
assert ticket is not None
print(f"{ticket.severity}: {ticket.title!r} on {ticket.nodes}")
