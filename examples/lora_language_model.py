"""Federated LoRA fine-tuning of a small language model: only the adapters travel.

A GPT-2 of 104 thousand parameters, made from its configuration, learns the characters of one text.
Its weights are then frozen, `peft` adds adapters to them, and four clients fine-tune those with
FedOBD, each on sentences of its own in another style. All clients hold the frozen network already
(`shared_start`), so that it never travels.

    pip install 'fedobd[hf]'
    python examples/lora_language_model.py

It prints how much of the model is trained, and for each round the bytes and the model's loss, in
nats a character, on the clients' sentences. The texts are tiny: what it shows is the traffic.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import fedobd

BEFORE = (
    "the miller opens the gate at dawn and looks at the river. when the water is high he lets "
    "the wheel turn, and when it is low he mends the sacks. in the evening he closes the gate, "
    "and the river goes on past the village, past the fields, to the sea that he never saw. "
)
CLIENTS = (
    "order one: four sacks of flour to the baker. order two: two sacks of rye to the inn. ",
    "order three: nine sacks of rye to the harbour. order four: one sack to the school. ",
    "order five: six sacks of flour to the inn. order six: two sacks of rye to the baker. ",
    "order seven: three sacks to the harbour. order eight: five sacks of rye to the school. ",
)
ALPHABET = sorted(set(BEFORE + "".join(CLIENTS)))
CONTEXT = 32  # characters that the model looks at
SEED = 0


def windows(text: str) -> torch.Tensor:
    """Return every run of CONTEXT characters as their numbers, int64, shape (n, CONTEXT)."""
    numbers = torch.tensor([ALPHABET.index(character) for character in text])
    return numbers.unfold(0, CONTEXT, 1)


def mean_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the next character, in nats, 0-dim."""
    logits = model(input_ids=tokens).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def loss_on(model: nn.Module, tokens: torch.Tensor) -> float:
    """Return the same as a number, without gradients."""
    with torch.no_grad():
        return float(mean_loss(model, tokens))


def train(model: nn.Module, tokens: torch.Tensor, epochs: int, rate: float) -> float:
    """Train what is not frozen, in place, and return the loss of the last batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(tokens)), 16):
            optimizer.zero_grad()
            loss = mean_loss(model, tokens[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return float(loss.detach())


def make_model() -> nn.Module:
    """Return a language model that knows one text, frozen, with adapters to be trained."""
    config = GPT2Config(
        vocab_size=len(ALPHABET), n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    train(model, windows(BEFORE), epochs=6, rate=3e-3)
    lora = LoraConfig(r=4, lora_alpha=32, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    inject_adapter_in_model(lora, model)  # freezes the model's own weights
    return model


def main() -> None:
    """Fine-tune with FedOBD and print each round."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # more only get in each other's way with so small a network
    model = make_model()
    data = [windows(text) for text in CLIENTS]
    everyone = torch.cat(data)
    start = fedobd.get_state(model)
    schema = fedobd.decompose(model)
    frozen = sum(schema.tensors[number].num_elements for number in schema.frozen())
    print(f"{frozen:,} parameters are frozen, {schema.num_parameters:,} are trained and travel")

    method = fedobd.FedOBD(
        codec=fedobd.Codec(dropout_rate=0.3),
        stage_one_rounds=4, stage_one_epochs=2, stage_two_epochs=3, cohort=2,
    )  # fmt: skip
    clients = len(data)
    server = fedobd.ServerSession(
        method, schema, start, num_clients=clients, seed=SEED, shared_start=True
    )
    print(f"before: loss {loss_on(model, everyone):.2f}")
    while (plan := server.begin_round()) is not None:
        broadcast = server.broadcast().data
        for number in plan.cohort:
            client = fedobd.ClientSession(
                method, schema, client=number, seed=SEED, state=start, start=start
            )
            if server.needs_initial_payload(number):
                client.initialize(server.initial_payload(number).data)
            fedobd.load_state(model, client.receive(broadcast))
            loss = train(model, data[number], plan.epochs, rate=1e-2)
            report = fedobd.Report(num_examples=len(data[number]), train_loss=loss)
            server.receive(number, client.upload(fedobd.get_state(model), report).data)
        record = server.end_round()
        fedobd.load_state(model, server.state)
        print(
            f"round {record.round} stage {record.stage}: {record.uplink_bytes:6,} bytes up, "
            f"{record.downlink_bytes:6,} down, loss {loss_on(model, everyone):.2f}"
        )
    everything = 4 * (frozen + schema.num_parameters)
    print(f"one copy of the whole model in float32 would take {everything:,} bytes")


if __name__ == "__main__":
    main()
