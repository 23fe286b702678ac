"""rewards.py, images: the decoder against a slow one, CLIP against cosines, scorers on the loopback address."""

import base64
import copy
import itertools
import json
import math
import os
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import LAUNCH_2, llada_checkpoint
from safetensors.torch import save_file

import maskgrpo as m
import rewards
from rewards import DataError, MagvitConfig, ScorerError

# ---------------------------------------------------------------------------------------------
# Codes -> pixels
# ---------------------------------------------------------------------------------------------

TINY = MagvitConfig(ch=32, ch_mult=(1, 2, 2), num_res_blocks=(1, 2, 1), z_channels=5)


def conv(x, weight, bias):
    """A convolution of (C, H, W), padded to its own size, as a sum of shifted products."""
    k = weight.shape[-1]
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    out = np.zeros((len(weight), *x.shape[1:])) + bias[:, None, None]
    for dy, dx in itertools.product(range(k), range(k)):
        moved = padded[:, dy : dy + x.shape[1], dx : dx + x.shape[2]]
        out += (weight[:, :, dy, dx] @ moved.reshape(len(x), -1)).reshape(out.shape)
    return out


def slow_decode(weights: dict, config: MagvitConfig, codes: list[int]) -> np.ndarray:
    """One image (3, H, H), about -1 to 1, in float64 and by the published names."""
    layer = lambda name, x: conv(x, weights[f"decoder.{name}.weight"], weights[f"decoder.{name}.bias"])
    swish = lambda x: x / (1 + np.exp(-x))

    def norm(name, x):
        out, size = np.empty_like(x), len(x) // 32
        for c in range(len(x)):
            group = x[c // size * size : c // size * size + size]
            out[c] = (x[c] - group.mean()) / math.sqrt(group.var() + 1e-6)
            out[c] = out[c] * weights[f"decoder.{name}.weight"][c] + weights[f"decoder.{name}.bias"][c]
        return out

    def block(name, x):
        h = layer(f"{name}.conv1", swish(norm(f"{name}.norm1", x)))
        h = layer(f"{name}.conv2", swish(norm(f"{name}.norm2", h)))
        return h + (layer(f"{name}.nin_shortcut", x) if len(h) != len(x) else x)

    def attention(name, x):
        h = norm(f"{name}.norm", x)
        q, k, v = (layer(f"{name}.{part}", h).reshape(len(x), -1) for part in "qkv")
        out = np.empty_like(q)
        for i in range(q.shape[1]):
            weight = np.array([math.exp(q[:, i] @ k[:, j] / math.sqrt(len(x))) for j in range(q.shape[1])])
            out[:, i] = v @ weight / weight.sum()
        return x + layer(f"{name}.proj_out", out.reshape(x.shape))

    side, bits = math.isqrt(len(codes)), config.z_channels
    z = np.empty((bits, side, side))
    for place, code in enumerate(codes):
        for bit, digit in enumerate(f"{code:0{bits}b}"):
            z[bit, place // side, place % side] = 1 if digit == "1" else -1
    x = layer("conv_in", layer("post_quant_conv", z))
    x = block("mid.block_2", attention("mid.attn_1", block("mid.block_1", x)))
    for level in (2, 1, 0):
        for i in range(config.num_res_blocks[level]):
            x = block(f"up.{level}.block.{i}", x)
        if level:
            doubled = np.array([[[row[j // 2] for j in range(2 * len(row))] for row in plane] for plane in x])
            x = layer(f"up.{level}.upsample.conv", doubled.repeat(2, axis=1))
    return layer("conv_out", swish(norm("norm_out", x)))


def magvit(path, form="model.safetensors", change=lambda weights: weights, config=TINY):
    """A random checkpoint in the published format: decoder, a bit of an encoder, the quantiser's buffer."""
    torch.manual_seed(0)
    weights = {f"decoder.{name}": w for name, w in rewards.MagvitDecoder(TINY).state_dict().items()}
    weights = {name: torch.randn_like(w) if w.dim() == 1 else w * 4 for name, w in weights.items()}
    weights |= {"encoder.conv_in.weight": torch.zeros(2), "quantize.embedding": torch.zeros(32, 5)}
    path.mkdir()
    (save_file if form.endswith("safetensors") else torch.save)(change(weights), path / form)
    settings = {"_class_name": "MAGVITv2", "ch": config.ch, "ch_mult": config.ch_mult}
    settings |= {"num_res_blocks": config.num_res_blocks, "z_channels": config.z_channels}
    (path / "config.json").write_text(json.dumps(settings))
    return weights


def test_published_size():
    """39.9M parameters; and the sum by hand, a convolution being k k in out + out, a norm 2 channels."""
    with torch.device("meta"):
        decoder = rewards.MagvitDecoder()
    block = lambda a, b: 2 * a + 9 * a * b + b + 2 * b + 9 * b * b + b + (a * b + b if a != b else 0)
    count = (13 * 13 + 13) + (9 * 13 * 512 + 512) + 2 * block(512, 512) + (2 * 512 + 4 * (512 * 512 + 512))
    before = 512
    for width, n in zip((512, 256, 256, 128, 128), (3, 4, 3, 4, 4)):
        count += block(before, width) + (n - 1) * block(width, width)
        before = width
    count += sum(9 * w * w + w for w in (512, 256, 256, 128)) + 2 * 128 + 9 * 128 * 3 + 3
    assert sum(p.numel() for p in decoder.parameters()) == count and round(count / 1e6, 1) == 39.9
    assert {"up.3.block.0.nin_shortcut.weight", "up.1.upsample.conv.bias", "up.0.block.3.norm2.weight"} <= set(
        decoder.state_dict()
    )
    codes = torch.zeros(1, 32 * 32, dtype=torch.long, device="meta")
    assert decoder(codes).shape == (1, 3, 512, 512)


@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_decoder_is_the_slow_one(tmp_path, form):
    """In float64 to rounding error; as 8-bit pixels but for a value in 100 that float32 rounds to the next level."""
    weights = magvit(tmp_path / "magvit", form)
    exact = {name: w.double().numpy() for name, w in weights.items()}
    decoder = rewards.load_magvit(str(tmp_path / "magvit"))
    codes = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(1))
    codes[0, :2] = torch.tensor([0, 31])
    slow = np.stack([slow_decode(exact, TINY, row) for row in codes.tolist()])
    pixels = decoder.pixels(codes, batch=2)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 12, 12, 3)
    levels = np.round((np.clip(slow, -1, 1) + 1) * 127.5).transpose(0, 2, 3, 1)
    away = np.abs(pixels.numpy() - levels)
    assert away.max() <= 1 and away.mean() < 0.01
    assert levels.std() > 20 and levels.min() == 0 and levels.max() == 255  # a picture, clipped at both ends
    alone = rewards.load_magvit(str(tmp_path / "magvit" / form))
    assert np.abs(alone.double()(codes).numpy() - slow).max() < 1e-9


def test_bad_codes(tmp_path):
    decoder = rewards.MagvitDecoder(TINY)
    for code in (32, -1):
        codes = torch.zeros(2, 4, dtype=torch.long)
        codes[1, 3] = code
        with pytest.raises(DataError, match=f"image 1, place 3: code {code} is outside the codebook, 0 to 31"):
            decoder.pixels(codes)
    with pytest.raises(DataError, match="5 codes is not square"):
        decoder.pixels(torch.zeros(1, 5, dtype=torch.long))


class Trap:
    """An object whose pickle makes a folder when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_bad_weights(tmp_path):
    """Each in one line that names the file."""

    def error(name, **options):
        magvit(tmp_path / name, **options)
        with pytest.raises(DataError) as caught:
            rewards.load_magvit(str(tmp_path / name))
        assert name in str(caught.value) and "\n" not in str(caught.value)
        return str(caught.value)

    lacking = error("lacking", change=lambda w: {k: v for k, v in w.items() if k != "decoder.mid.attn_1.q.bias"})
    assert "1 weights do not fit" in lacking
    assert "decoder.mid.attn_1.q.bias: expected [64], found nothing" in lacking
    more = error("more", change=lambda w: w | {"decoder.up.0.attn.0.q.bias": torch.zeros(3)})
    assert "decoder.up.0.attn.0.q.bias: expected nothing, found [3]" in more
    assert "decoder.conv_in.bias: expected [128], found [64]" in error(
        "wide", config=MagvitConfig(64, (1, 2, 2), (1, 2, 1), 5)
    )
    assert "not the sizes" in error("sizes", config=MagvitConfig(33, (1, 2, 2), (1, 2, 1), 5))
    assert "cannot be read" in error("list", form="w.bin", change=lambda w: [1])
    assert "cannot be read" in error(
        "pickle", form="w.bin", change=lambda w: {"decoder.a": Trap(str(tmp_path / "ran"))}
    )
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text").mkdir()
    with pytest.raises(DataError, match="text: no weights in it"):
        rewards.load_magvit(str(tmp_path / "text"))
    (tmp_path / "text" / "w.safetensors").write_text("<html>")
    with pytest.raises(DataError, match=r"w\.safetensors: cannot be read"):
        rewards.load_magvit(str(tmp_path / "text"))
    for where in (str(tmp_path / "none"), "nobody/nothing"):
        with pytest.raises(DataError, match="not a file, not a folder, and not to be had from the hub") as caught:
            rewards.load_magvit(where)
        assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------
# PNG and CLIP
# ---------------------------------------------------------------------------------------------


def some_images(n=3, height=20, width=24):
    return torch.randint(0, 256, (n, height, width, 3), generator=torch.Generator().manual_seed(5)).to(torch.uint8)


def read_png(data: bytes) -> np.ndarray:
    """An 8-bit RGB file without row filters, chunk by chunk, check sums included."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + size
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


def test_png_by_hand():
    for image in some_images():
        assert (read_png(rewards.png(image)) == image.numpy()).all()


def test_png_by_pillow():
    image = pytest.importorskip("PIL.Image")
    import io

    for pixels in some_images():
        read = image.open(io.BytesIO(rewards.png(pixels)))
        assert read.mode == "RGB" and (np.asarray(read) == pixels.numpy()).all()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A random CLIP in the official format: images of 8 x 8 in patches of 4, 16 text positions, letters as tokens."""
    pytest.importorskip("PIL")
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip") / "clip"
    letters = [chr(c) + end for c in range(97, 123) for end in ("", "</w>")]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", model_max_length=16)
    text = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = text | {"image_size": 8, "patch_size": 4}
    text |= {"vocab_size": len(vocab), "max_position_embeddings": 16}
    text |= {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"], "pad_token_id": 0}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model = CLIPModel(config)
    for p in (p for p in model.parameters() if p.dim() > 1):
        torch.nn.init.normal_(p, std=0.5)  # the default initialisation gives every image nearly the same features
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return path


@pytest.mark.parametrize("sign", [1, -1])
def test_clip_score_is_the_cosine(clip, sign):
    """Against the cosine of transformers' own features, each image and prompt alone; and with all signs turned."""
    model, processor = rewards.load_clip(str(clip))
    with torch.no_grad():
        model.visual_projection.weight *= sign
    images = (some_images(9) * torch.linspace(0, 1, 9)[:, None, None, None]).to(torch.uint8)  # from dark to light
    prompts = ["a cat", "two dogs on a mat in the sun with a hat", "z", "a dog", "red", "a", "bb", "q r s", "x y"]
    cosines = []
    for image, prompt in zip(images, prompts):
        inputs = processor(text=prompt, images=image.numpy(), return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            found = model.get_image_features(inputs["pixel_values"])
            asked = model.get_text_features(inputs["input_ids"])
        u, v = (np.asarray(getattr(f, "pooler_output", f)[0], dtype=float) for f in (found, asked))
        cosines.append(u @ v / math.sqrt((u @ u) * (v @ v)))
    assert max(map(abs, cosines)) > 0.2 and len({round(c, 3) for c in cosines}) == 9
    for batch in (4, 32):
        scores = rewards.clip_score(images, prompts, model, processor, batch)
        assert scores == pytest.approx([100 * max(0, c) for c in cosines], abs=1e-3)


def test_clip_that_cannot_be_loaded(clip):
    with pytest.raises(DataError, match="CLIP .*none: cannot be loaded") as caught:
        rewards.load_clip(str(clip / "none"))
    assert "\n" not in str(caught.value)


def test_clip_asks_for_pillow(monkeypatch):
    monkeypatch.setattr(rewards.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install pillow"):
        rewards.load_clip("anywhere")


# ---------------------------------------------------------------------------------------------
# Remote scorers
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A scorer on the loopback address; the URL's last part says how it behaves. server.seen: the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            kind = self.path.rpartition("/")[2]
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            http.seen.append(body)
            means = [float(read_png(base64.b64decode(data)).mean()) for data in body["images"]]
            scores = [mean + len(prompt) for mean, prompt in zip(means, body["prompts"])]
            status, text, location = 200, json.dumps({"scores": scores}), ""
            if kind == "slow":
                http.done.wait(20)
            elif kind == "flaky" and len(http.seen) < 3:
                status, text = (500, 429)[len(http.seen) - 1], "no memory"
            elif kind in ("broken", "lost", "moved"):
                status = {"broken": 503, "lost": 404, "moved": 302}[kind]
                location = f"http://127.0.0.1:{http.server_port}/good" if kind == "moved" else ""
            elif kind == "huge":
                text = " " * (rewards.LARGEST_ANSWER + 1)
            text = http.answers.get(kind, text)
            self.send_response(status)
            if location:
                self.send_header("Location", location)
            self.end_headers()
            for letter in text if kind == "trickle" else [text]:
                self.wfile.write(letter.encode())
                if kind == "trickle" and http.done.wait(0.05):
                    return

        def log_message(self, *args):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *args):  # a client that hangs up is what some tests are about
            pass

    http = Server(("127.0.0.1", 0), Handler)
    http.seen, http.done, http.answers = [], threading.Event(), {}
    http.url = f"http://127.0.0.1:{http.server_port}/"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield http
    http.done.set()
    http.shutdown()
    http.server_close()
    thread.join()


def scorer(url, **options):
    return rewards.RemoteScorer(url, "test", **({"timeout": 10, "retries": 2, "pause": 0.01} | options))


def failure(url, **options):
    """The one line in which a scorer fails."""
    with pytest.raises(ScorerError) as caught:
        scorer(url, **options)(some_images(2), ["a", "b"])
    assert str(caught.value).startswith(f"{url}: ") and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{url}: ")


def test_scorer(server, monkeypatch):
    """Scores that the server computes from the pixels, in batches, past any proxy."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    images, prompts = some_images(5), ["a", "bb", "é\u2028", "", "eeeee"]
    scores = scorer(server.url + "good", batch=2)(images, prompts)
    assert scores == pytest.approx([image.double().mean().item() + len(p) for image, p in zip(images, prompts)])
    assert [len(body["images"]) for body in server.seen] == [2, 2, 1]
    assert all(set(body) == {"name", "prompts", "images"} and body["name"] == "test" for body in server.seen)


def test_scorer_is_asked_again(server):
    """After a 500 and a 429, and no more often than allowed."""
    assert len(scorer(server.url + "flaky")(some_images(2), ["a", "b"])) == 2 and len(server.seen) == 3
    server.seen.clear()
    assert failure(server.url + "broken") == "HTTP 503; 3 attempts; is the scorer running there?"
    assert len(server.seen) == 3
    assert failure(server.url + "lost", retries=0) == "HTTP 404, on attempt 1; expected 200"


def test_scorer_that_is_down_or_slow(server):
    closed = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    url = f"http://127.0.0.1:{closed.server_port}/hpsv3"
    closed.server_close()
    assert "down: " in failure(url) and "refused" in failure(url) and "3 attempts" in failure(url)
    assert "down: " in failure("http://a..b/hpsv3")
    for kind in ("slow", "trickle"):
        server.seen.clear()
        text = failure(server.url + kind, timeout=0.2, retries=1)
        assert text.startswith("slow: no answer in 0.2 s; 2 attempts") and len(server.seen) == 2


def test_scorer_that_answers_nonsense(server):
    """It is asked once: asking again would not help."""
    server.answers = {
        "html": "<html>\n<body>busy</body></html>",
        "empty": "",
        "list": "[1, 2]",
        "other": '{"score": [1, 2]}',
        "text": '{"scores": "12"}',
        "few": '{"scores": [1]}',
        "nan": '{"scores": [1, NaN]}',
        "inf": '{"scores": [1, Infinity]}',
        "large": '{"scores": [1, 1' + "0" * 400 + "]}",
        "bool": '{"scores": [1, true]}',
        "null": '{"scores": [1, null]}',
        "deep": "[" * 200_000,
        "digits": '{"scores": [1, ' + "1" * 5000 + "]}",
    }
    for kind in server.answers:
        assert failure(server.url + kind).startswith("nonsense: ")
    assert len(server.seen) == len(server.answers)
    assert '1 scores for 2 images; expected {"scores": [2 finite numbers]}' in failure(server.url + "few")
    assert "a score is 'nan'" in failure(server.url + "nan")
    assert "an answer above 1048576 bytes" in failure(server.url + "huge")
    server.seen.clear()
    assert f"HTTP 302 to '{server.url}good'" in failure(server.url + "moved")
    assert len(server.seen) == 1  # not followed


# ---------------------------------------------------------------------------------------------
# Weighted sums, and prompts
# ---------------------------------------------------------------------------------------------


def test_parse_scorers():
    text = "clip=1, http://127.0.0.1:8000/hpsv3=0.5,https://host/a/reward.v2?k=v=-2e-1"
    assert rewards.parse_scorers(text) == [
        ("clip", 1, rewards.CLIP),
        ("hpsv3", 0.5, "http://127.0.0.1:8000/hpsv3"),
        ("reward.v2", -0.2, "https://host/a/reward.v2?k=v"),
    ]
    assert rewards.parse_scorers("clip:some/folder=0") == [("clip", 0, "some/folder")]
    for text, reason in (
        ("", "could not convert"),
        ("clip", "'clip': could not convert"),
        ("clip=1,", "'': could not convert"),
        ("clip=much", "could not convert string to float: 'much'"),
        ("clip=nan", "a weight is a finite number"),
        ("clip=1,clip:other=2", "'clip:other=2': 'clip' is named twice"),
        ("clips=1", "expected WHERE=WEIGHT"),
        ("http://host=1", "expected WHERE=WEIGHT"),
        ("http://host:x/hpsv3=1", "Port could not be cast"),
        ("http://user:secret@host/hpsv3=1", "expected WHERE=WEIGHT"),
        ("http://host/ä=1", "expected WHERE=WEIGHT"),
        ("file:///etc/passwd=1", "expected WHERE=WEIGHT"),
    ):
        with pytest.raises(DataError) as caught:
            rewards.parse_scorers(text)
        assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_pixel_reward(server, clip, tmp_path):
    """Each term is its scorer's; the codes are decoded once; the sum is the weighted one."""
    magvit(tmp_path / "magvit")
    decoder = rewards.load_magvit(str(tmp_path / "magvit"))
    calls = []
    decode = lambda codes: calls.append(codes) or decoder.pixels(codes)
    text = f"clip:{clip}=0.5,{server.url}good=-2"
    reward = rewards.PixelReward(decode, text, timeout=10, retries=0)
    codes = torch.randint(0, 32, (3, 9), generator=torch.Generator().manual_seed(2))
    prompts = ["a cat", "a dog", "two"]
    scores = reward(codes, prompts)
    images = decoder.pixels(codes)
    assert list(scores) == ["clip", "good"] and len(calls) == 1
    assert scores["clip"] == rewards.clip_score(images, prompts, *rewards.load_clip(str(clip)))
    means = [image.double().mean().item() + len(prompt) for image, prompt in zip(images, prompts)]
    assert scores["good"] == pytest.approx(means)
    expected = [0.5 * c - 2 * g for c, g in zip(scores["clip"], means)]
    assert reward.total(scores) == pytest.approx(expected)


def test_prompts_from_text(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red cube\r\n\n  two dogs  \na\u2028b\n", encoding="utf-8")
    assert [p["question"] for p in rewards.load_prompts(str(file))] == ["a red cube", "two dogs", "a\u2028b"]
    assert rewards.load_prompts(str(file))[0] == {"question": "a red cube", "answer": "", "tag": ""}
    for content, reason in (("\n \n", "no prompts"), ('{"prompt": "a"}\n', "holds JSON")):
        file.write_text(content)
        with pytest.raises(DataError, match=rf"prompts\.txt: {reason}"):
            rewards.load_prompts(str(file))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as a text file"):
        rewards.load_prompts(str(file))


def test_prompts_of_geneval(tmp_path):
    """The published lines, with an extra field that is not used."""
    file = tmp_path / "evaluation_metadata.jsonl"
    count = {"include": [{"class": "oven", "count": 3}], "exclude": [{"class": "oven", "count": 4}]}
    kite = [{"class": "bat", "count": 1}, {"class": "kite", "count": 1, "position": ["left of", 0]}]
    rows = [
        {"tag": "counting"} | count | {"prompt": "a photo of three ovens"},
        {"tag": "position", "include": kite, "prompt": "a photo of a kite left of a bat", "long_prompt": "A kite."},
        {"prompt": "a photo"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = rewards.load_prompts(str(file))
    assert [(p["question"], p["tag"]) for p in problems] == [(row["prompt"], row.get("tag", "")) for row in rows]
    assert json.loads(problems[0]["answer"]) == count and json.loads(problems[1]["answer"]) == {"include": kite}
    assert problems[2]["answer"] == ""
    for line, reason in (
        ("{", "line 2: not JSON"),
        ("[]", "line 2: expected a JSON object"),
        ('{"tag": "colors"}', 'line 2: field "prompt" is missing'),
        ('{"prompt": " "}', 'line 2: field "prompt" is missing'),
        ('{"prompt": "a", "tag": 1}', 'line 2: "tag" is not str'),
        ('{"prompt": "a", "include": {}}', 'line 2: "include" is not list'),
    ):
        file.write_text(json.dumps(rows[0]) + "\n" + line + "\n")
        with pytest.raises(DataError, match=f"metadata.jsonl, {reason}"):
            rewards.load_prompts(str(file))
    file.write_text("")
    with pytest.raises(DataError, match="no prompts"):
        rewards.load_prompts(str(file))


# ---------------------------------------------------------------------------------------------
# maskgrpo.py --task t2i on pixels
# ---------------------------------------------------------------------------------------------


RUN = ("--task", "t2i", "--eval_every", 0, "--steps", 2, "--mu", 2)


def run(*flags):
    AcceleratorState._reset_state(reset_partial_state=True)
    return m.cli([*map(str, (*RUN, *flags))])


def test_mmada_from_prompts_to_pixels_to_rewards(bpe, clip, server, tmp_path):
    """A random checkpoint, decoder and CLIP in the published formats, prompts in a text file, a remote scorer."""
    tokenizer = copy.deepcopy(bpe)
    tokenizer.add_special_tokens({"additional_special_tokens": list(m.IMAGE_MARKS)}, replace_extra_special_tokens=False)
    mmada = llada_checkpoint(tmp_path / "mmada", tokenizer, codebook=32)
    decoder = tmp_path / "magvit"
    magvit(decoder)
    (tmp_path / "prompts.txt").write_text("".join(f"a {word} in the sun\n" for word in "abcdefghijklmnopqrstuvwxyz"))
    rewards_flag = f"clip:{clip}=0.01,{server.url}good=0.5"
    flags = ["--model", mmada, "--data", tmp_path / "prompts.txt", "--decoder", decoder, "--rewards", rewards_flag]
    flags += ["--gen_length", 17, "--batch_size", 4, "--group_size", 2, "--accumulation", 1, "--max_steps", 2, "--no-bf16"]
    assert run(*flags, "--output_dir", tmp_path / "run") == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert {"reward/clip", "reward/good"} <= line.keys() and line["reward"] == pytest.approx(
        line["reward/clip"] + line["reward/good"], abs=1e-5
    )
    assert results["config"]["guidance"] == 3.5 and results["config"]["sampler"] == "emerge"
    rows = [json.loads(row) for row in (tmp_path / "run" / "completions_after.jsonl").read_text().splitlines()]
    codes = [[int(code) for code in row["completion"].split()] for row in rows]
    assert all(len(row) == 16 and max(row) < 32 for row in codes)
    pictures = rewards.load_magvit(str(decoder)).pixels(torch.tensor(codes))
    model, processor = rewards.load_clip(str(clip))
    scores = rewards.clip_score(pictures, [row["prompt"] for row in rows], model, processor)
    assert [row["terms"]["clip"] for row in rows] == pytest.approx([0.01 * score for score in scores], abs=1e-4)
    assert (tmp_path / "run" / "images.png").stat().st_size > 1000
    # the trained model draws again from its own format
    again = [*flags[2:], "--model", tmp_path / "run", "--eval_only", "--output_dir", tmp_path / "again"]
    assert run(*again) == 0
    figures = json.loads((tmp_path / "again" / "results.json").read_text())
    assert figures["eval_only"]["accuracy"] == pytest.approx(results["after"]["accuracy"], abs=1e-5)


def test_a_scorer_that_fails_leaves_a_run_that_goes_on(server, tmp_path, monkeypatch, capfd):
    """The tiny model's pictures; the scorer answers the first three requests and then nonsense."""
    monkeypatch.chdir(tmp_path)
    flags = ["--base_steps", 5, "--base_accuracy", 1, "--eval_n", 6, "--batch_size", 8, "--max_steps", 3, "--save_every", 1]
    flags += ["--rewards", f"{server.url}good=1", "--output_dir", tmp_path / "run"]
    post, asked = rewards.RemoteScorer.post, []

    def fails_later(self, body):
        asked.append(1)
        return post(self, body) if len(asked) < 5 else b"<html>"

    monkeypatch.setattr(rewards.RemoteScorer, "post", fails_later)
    assert run(*flags) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert "nonsense: b'<html>'" in error and f"--resume --output_dir {tmp_path / 'run'} goes on from here" in error
    monkeypatch.setattr(rewards.RemoteScorer, "post", post)
    assert run("--resume", "--output_dir", tmp_path / "run") == 0
    flags[-1] = tmp_path / "whole"
    assert run(*flags) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()


def test_two_processes_draw_and_learn_what_one_does(server, tmp_path, monkeypatch, script):
    """The same images before and after, the same metrics; guided; the pixels' brightness is the reward."""
    monkeypatch.chdir(tmp_path)
    base = ["--base_steps", 5, "--base_accuracy", 1, "--max_steps", 1, "--eval_n", 2, "--batch_size", 8]
    assert run(*base, "--output_dir", tmp_path / "base") == 0
    flags = ["--model", tmp_path / "base", "--rewards", f"{server.url}good=1", "--guidance", 1]
    flags += ["--eval_n", 6, "--max_steps", 3, "--lr", 1e-3, "--warmup", 0]
    assert run(*flags, "--batch_size", 16, "--output_dir", tmp_path / "one") == 0
    code, out, err = script(*RUN, *flags, "--batch_size", 8, "--output_dir", tmp_path / "two", launch=LAUNCH_2)
    assert code == 0 and "2 processes" in out, out + err
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    for a, b in zip(map(json.loads, one), map(json.loads, two), strict=True):
        assert a["grad_norm"] > 0.01 and a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a)
    for phase in ("before", "after"):
        one, two = ((tmp_path / name / f"completions_{phase}.jsonl").read_text().splitlines() for name in ("one", "two"))
        assert [json.loads(row)["completion"] for row in one] == [json.loads(row)["completion"] for row in two]
    before, after = ((tmp_path / "one" / f"completions_{phase}.jsonl").read_text() for phase in ("before", "after"))
    assert before != after


def test_prompts_that_the_tiny_model_cannot_read_are_named(tmp_path, capfd):
    known = sorted(rewards.scene_table())[:40]
    (tmp_path / "p.txt").write_text("\n".join([*known, "a photo of a cat"]))
    assert run("--data", tmp_path / "p.txt", "--output_dir", tmp_path / "run") == 2
    assert "prompt 'a photo of a cat': not one that the embedded t2i task knows" in capfd.readouterr().err
    assert run("--rewards", "clip", "--output_dir", tmp_path / "run") == 2
    assert "reward 'clip'" in capfd.readouterr().err
