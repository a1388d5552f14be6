"""Text conditioning, against diffusers' WanPipeline on a tiny random encoder."""

import logging

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, UMT5EncoderModel

from reelway.kernels.wan.config import TEXT_LENGTH
from reelway.kernels.wan.text import TextEncoder, build_word_tokenizer, clean_prompt, tiny_text_config

VOCABULARY = ["a", "red", "blue", "ball", "square", "moves", "left", "don", "t", "'", ",", ".", "!"]
LONG = "a red ball moves left. " * 200
PROMPTS = ["A red ball, moving LEFT!", "", "a  blue\n square don&amp;#39;t  move...", LONG]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    model = UMT5EncoderModel(tiny_text_config(3 + len(VOCABULARY))).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return TextEncoder(model, build_word_tokenizer(VOCABULARY))


@pytest.fixture(scope="module")
def folder(encoder: TextEncoder, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("model")
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(encoder: TextEncoder) -> WanPipeline:
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(encoder.tokenizer, encoder.model, vae, scheduler, transformer=None)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.text("&amp;#39lt;quo \t\u3000\n Ã©â€™")))
def test_prompts_are_cleaned_as_diffusers_does(text: str) -> None:
    assert clean_prompt(text) == prompt_clean(text)


def test_cleaning_mends_text_and_unescapes_twice() -> None:
    assert clean_prompt("  cafÃ© &amp;lt;3\n\t now ") == "café <3 now"
    assert clean_prompt("<b> &amp;lt;3") == "<b> <3"  # a tag keeps ftfy from unescaping


def test_context_is_that_of_diffusers_folded(encoder: TextEncoder, pipeline: WanPipeline) -> None:
    reference = pipeline._get_t5_prompt_embeds(PROMPTS, max_sequence_length=TEXT_LENGTH)
    context = encoder(PROMPTS)
    rows = context.rows.shape[1]
    assert rows == TEXT_LENGTH
    torch.testing.assert_close(context.rows, reference[:, :rows], rtol=1e-5, atol=1e-5)
    short = encoder(PROMPTS[:3])
    assert not short.rows.requires_grad
    _, mask = encoder.tokenize(PROMPTS[:3])
    assert mask.sum(dim=1).tolist() == [8, 1, 11]
    assert short.rows.shape == (3, 12, 128)
    torch.testing.assert_close(short.rows, reference[:3, :12], rtol=1e-5, atol=1e-5)
    assert reference[:3, 12:].abs().max() == 0
    weights = short.score_bias.double().exp().sum(dim=1)  # how many of Wan's rows the folded ones stand for
    expected = torch.full((3,), float(TEXT_LENGTH), dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=0)


def test_a_prompt_does_not_depend_on_its_neighbours(encoder: TextEncoder) -> None:
    alone, together = encoder(PROMPTS[:1]).rows[0], encoder(PROMPTS[:3]).rows[0]
    torch.testing.assert_close(together[: len(alone)], alone, rtol=1e-5, atol=1e-5)
    assert together[len(alone) :].abs().sum() == 0


def test_long_prompts_are_cut_and_logged_once(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    fresh = TextEncoder(encoder.model, encoder.tokenizer)
    with caplog.at_level(logging.WARNING):
        ids, mask = fresh.tokenize([LONG])
        fresh.tokenize([LONG, "a"])
    assert [record.getMessage() for record in caplog.records] == ["a prompt of 1201 tokens is cut to 512"]
    assert ids.shape == mask.shape == (1, TEXT_LENGTH)
    assert ids[0, -1] == 1
    assert mask.all()


def test_gradients_reach_the_encoder(encoder: TextEncoder) -> None:
    context = encoder.embed(*encoder.tokenize(["a red ball", "left"]))
    torch.testing.assert_close(context.rows, encoder(["a red ball", "left"]).rows)
    context.rows.square().sum().backward()
    gradient = encoder.model.shared.weight.grad
    used = {index for index, row in enumerate(gradient) if row.abs().sum() > 0}
    words = {3 + VOCABULARY.index(word) for word in ("a", "red", "ball", "left")}
    assert used == {1, *words}
    encoder.zero_grad(set_to_none=True)


@pytest.mark.parametrize("prompts", [[], "a red ball"])
def test_prompts_must_be_a_list(encoder: TextEncoder, prompts) -> None:
    with pytest.raises(ValueError, match="prompts: must be a list of at least one text"):
        encoder(prompts)


def test_a_folder_gives_back_the_encoder(encoder: TextEncoder, folder) -> None:
    loaded = TextEncoder.from_pretrained(folder)
    assert torch.equal(loaded(PROMPTS).rows, encoder(PROMPTS).rows)
    assert TextEncoder.from_pretrained(folder, torch.bfloat16)(["a"]).rows.dtype == torch.bfloat16
    modes = {file.stat().st_mode for file in (folder / "text_encoder").iterdir()}
    assert len(modes) == 1


def test_a_damaged_folder_is_named(folder, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"text_encoder/config.json: no such file"):
        TextEncoder.from_pretrained(tmp_path)
    TextEncoder.from_pretrained(folder).save_pretrained(tmp_path)
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"^{tmp_path}: text_encoder/ or tokenizer/ cannot be read"):
        TextEncoder.from_pretrained(tmp_path)


def test_words_become_ids_in_order(folder) -> None:
    for tokenizer in (build_word_tokenizer(VOCABULARY), AutoTokenizer.from_pretrained(folder / "tokenizer")):
        assert tokenizer.pad_token_id == 0
        assert tokenizer.eos_token_id == 1
        assert tokenizer.unk_token_id == 2
        assert len(tokenizer) == 3 + len(VOCABULARY)
        assert tokenizer("A red,BALL!! zebra").input_ids == [3, 4, 13, 6, 15, 15, 2, 1]
        assert tokenizer("").input_ids == [1]
        batch = tokenizer(["a", "a red ball"], padding=True)
        assert batch.input_ids == [[3, 1, 0, 0], [3, 4, 6, 1]]
        assert batch.attention_mask == [[1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("entry", ["Red", "two words", "ball.", "a", "</s>", ""])
def test_a_vocabulary_entry_that_no_text_gives_is_refused(entry: str) -> None:
    with pytest.raises(ValueError, match=r"^vocabulary: "):
        build_word_tokenizer(["a", entry])


def test_wan_pipeline_loads_what_is_saved(pipeline: WanPipeline, encoder: TextEncoder, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    loaded = WanPipeline.from_pretrained(tmp_path, transformer=None, local_files_only=True)
    again = loaded._get_t5_prompt_embeds(PROMPTS[:3], max_sequence_length=16)
    torch.testing.assert_close(again, pipeline._get_t5_prompt_embeds(PROMPTS[:3], max_sequence_length=16))
    torch.testing.assert_close(again[:, :12], encoder(PROMPTS[:3]).rows, rtol=1e-5, atol=1e-5)
