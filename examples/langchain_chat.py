"""A chain, streamed, and a structured answer, with LangChain.

pip install langchain-openai
python examples/langchain_chat.py [BASE_URL] [MODEL]        # http://127.0.0.1:8000 and demo, when left out
"""

import os
import sys
from typing import Annotated, Literal

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field, SecretStr

url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MLX_CLUSTER_URL", "http://127.0.0.1:8000")
model = sys.argv[2] if len(sys.argv) > 2 else os.environ.get("MLX_CLUSTER_MODEL", "demo")
chat = ChatOpenAI(
    model=model,
    base_url=f"{url}/v1",
    api_key=SecretStr(os.environ.get("OPENAI_API_KEY", "none")),
    temperature=0,
    max_completion_tokens=100,
)

chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | chat | StrOutputParser()
for text in chain.stream({"question": "What is a stage?"}):
    print(text, end="", flush=True)
print()


class Answer(BaseModel):
    sure: bool
    where: Annotated[list[Literal["mini1", "mini2", "master"]], Field(max_length=2)]


print(chat.with_structured_output(Answer, method="json_schema").invoke("Which nodes hold the model?"))
