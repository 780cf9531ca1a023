"""A tool call and its result, with OpenAI's client. The call is constrained: a tiny model writes valid arguments too.

pip install openai
python examples/openai_tools.py [BASE_URL] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
"""

import json
import os
import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLX_CLUSTER_URL", "http://127.0.0.1:8000")
model = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("MLX_CLUSTER_MODEL", "demo")
client = OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"))

TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Berlin", "Paris", "Tokyo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def weather(city: str) -> str:
    return f"It is sunny in {city}."


messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather in Berlin?"}]
answer = client.chat.completions.create(
    model=model,
    messages=messages,
    tools=[TOOL],
    tool_choice="required",
    parallel_tool_calls=False,
    temperature=0,
    max_tokens=60,
)
message = answer.choices[0].message
messages.append(message.to_dict())  # type: ignore[arg-type]  # an answer's message is a message of the next request
for call in message.tool_calls or []:
    assert call.type == "function"
    arguments = json.loads(call.function.arguments)
    print(f"the model calls {call.function.name}({arguments})")
    messages.append({"role": "tool", "tool_call_id": call.id, "content": weather(**arguments)})
final = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], temperature=0, max_tokens=60)
print(final.choices[0].message.content)
