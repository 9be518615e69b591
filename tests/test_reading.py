"""Reading senses: explanations and what they cost, bigrams, matching of seeds, and what chooses a sense."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_model
from scipy.stats import spearmanr

from backpack_lib import load
from backpack_lib.analysis import explanations as ex
from backpack_lib.analysis import similarity
from backpack_lib.analysis.bigrams import DISCOUNT, Bigrams, bigram_correlations, losses_by_part
from backpack_lib.analysis.matching import compare_models, likeness, match, match_null, profiles
from backpack_lib.analysis.roles import relations_of_text
from backpack_lib.analysis.scores import bits_per_byte
from backpack_lib.lessons import reading
from backpack_lib.model.hooks import hooked
from backpack_lib.studies import reading_study
from backpack_lib.text import planted
from backpack_lib.text.corpora import first_characters, open_corpus
from backpack_lib.text.words import token_of_word
from backpack_lib.text.writing import ids_of_text


@pytest.fixture(scope="module")
def trained():
    return load("planted")


@pytest.fixture(scope="module")
def rows(trained):
    return [ids_of_text(trained[1], text.text)[:50] for text in planted.generate(6, seed=31)]


@pytest.fixture(scope="module")
def texts(trained, rows):
    return ex.Replacement(trained[0], rows)


@pytest.fixture(scope="module")
def words(trained):
    return torch.tensor(planted.tokens_in_use(trained[1]))


# ---------------------------------------------------------------- said in words


def test_an_explanation_is_the_highest_and_lowest_words(trained, words):
    model, tokens = trained[0], words[[3, 40]]
    said = ex.explain(model, tokens, 4, words)
    with torch.no_grad():
        pushes = model.sense_vectors(tokens) @ model.get_output_embeddings().weight[words].T
    for n in range(2):
        for l in range(model.config.num_senses):
            order = words[pushes[n, l].argsort(descending=True)].tolist()
            assert said.up[n, l].tolist() == order[:4] and said.down[n, l].tolist() == order[::-1][:4]
    assert torch.equal(said.first(2).up, said.up[..., :2]) and torch.equal(said.rows([1]).down, said.down[1:])


def test_replaced_senses_cost_what_the_changed_model_says(trained, rows, texts):
    model, draw = trained[0], torch.Generator().manual_seed(0)
    new = {l: torch.randn(texts.senses[:, l].shape, generator=draw) for l in (2, 5)}

    def patch(token_ids, senses):
        for l, vectors in new.items():
            for row, token in enumerate(token_ids.tolist()):
                place = (texts.tokens == token).nonzero()
                if len(place):
                    senses = senses.index_put((torch.tensor(row), torch.tensor(l)), vectors[place[0, 0]])
        return senses

    def nats():
        found = []
        for row in rows:
            with torch.no_grad():
                log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
            found.append(-sum(log_probs[i - 1, row[i]].item() for i in range(1, len(row))))
        return sorted(found)

    assert sorted(texts.losses()) == pytest.approx(nats(), rel=1e-4)
    with hooked(model.backpack.patches, patch):
        assert sorted(texts.losses(new)) == pytest.approx(nats(), rel=1e-4)
    assert texts.losses(texts.zero(range(8))).sum() > texts.losses().sum()


@pytest.mark.parametrize("kind", ["size", "ridge"])
def test_a_simulator_sees_words_alone_and_learns_from_them(trained, words, kind):
    model = trained[0]
    said = ex.explain(model, words, 10, words)
    fit = torch.arange(len(words)) % 3 > 0
    made = ex.Simulator.fit(model, said.rows(fit), words[fit], kind)
    simulated = made(said.rows(~fit))
    with torch.no_grad():
        true = model.sense_vectors(words[~fit])
        mean = model.sense_vectors(words[fit]).mean(0)
    errors = ((simulated - true) ** 2).sum((0, 2)) / ((mean - true) ** 2).sum((0, 2))
    assert errors.mean() < 0.9  # better than the mean sense on words that it has not seen
    same = ex.Explanations(said.up[:1].expand(2, -1, -1), said.down[:1].expand(2, -1, -1))
    assert torch.equal(made(same)[0], made(same)[1])


def test_the_size_of_a_simulator_is_that_of_least_squares(trained, words):
    model = trained[0]
    said, E = ex.explain(model, words, 5, words), trained[0].get_output_embeddings().weight.detach()
    made = ex.Simulator.fit(model, said, words, "size")
    for l in (0, 3):
        x = (E[said.up[:, l]].mean(1) - E[said.down[:, l]].mean(1)).numpy()
        y = model.sense_vectors(words)[:, l].detach().numpy()
        x, y = x - x.mean(0), y - y.mean(0)
        size, *_ = np.linalg.lstsq(x.reshape(-1, 1), y.reshape(-1), rcond=None)
        assert made.weights[l, 0, 0].item() == pytest.approx(size[0], rel=1e-3)
        assert made.weights[l, 0, 1].item() == 0


def test_a_ridge_is_that_of_its_equation():
    draw = torch.Generator().manual_seed(0)
    X, Y = torch.randn(30, 4, generator=draw).double(), torch.randn(30, 3, generator=draw).double()
    X[:, -1] = 1
    _, found = ex._ridge(X, Y, (3.0, 0.1))
    penalty = 0.1 * 30 * X[:, :-1].var(0).mean()
    x, y = X[:, :-1] - X[:, :-1].mean(0), Y - Y.mean(0)
    slow = torch.linalg.inv(x.T @ x + penalty * torch.eye(3).double()) @ x.T @ y
    torch.testing.assert_close(found[:-1], slow)
    torch.testing.assert_close((X @ found).mean(0), Y.mean(0))


def test_no_word_is_simulated_by_what_has_seen_it(trained, words, monkeypatch):
    model = trained[0]
    tokens, others = words[:30], words[30:60]
    said, of_others = (ex.explain(model, some, 3, words) for some in (tokens, others))
    fitted, fit = [], ex.Simulator.fit.__func__

    def spy(cls, of_model, explanations, seen, kind="ridge"):
        fitted.append(set(seen.tolist()))
        return fit(cls, of_model, explanations, seen, kind)

    monkeypatch.setattr(ex.Simulator, "fit", classmethod(spy))
    simulated, mean = ex.cross_fitted(model, said, tokens, of_others, others)
    assert len(fitted) == 2 and not (fitted[0] & fitted[1]) - set(others.tolist())
    assert fitted[0] | fitted[1] == set(words[:60].tolist())
    assert simulated.shape == mean.shape == (30, 8, 64) and len(mean[:, 0].unique(dim=0)) == 2


def test_recovered_is_one_for_the_sense_itself_and_zero_for_nothing(texts):
    zero, original = texts.losses(texts.zero([1])), texts.losses()
    assert ex.recovered(zero, original, original) == pytest.approx(1) and ex.recovered(zero, zero, original) == 0
    value, low, high = ex.recovered_with_interval(zero, (zero + original) / 2, original)
    assert low == pytest.approx(0.5) and value == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_the_table_of_explanations_holds_each_sense_and_all_of_them(trained, rows, words, texts):
    model = trained[0]
    table = reading_study.explanation_table(model, rows, words, (1, 10))
    assert set(table["sense"]) == {*map(str, range(8)), "all"} and len(table) == 9 * 5
    taken = table[table["replaced by"] == "taken away"].set_index("sense")
    count = sum(texts.counts)
    assert taken.loc["3", "loss"] == pytest.approx(texts.losses(texts.zero([3])).sum() / count, rel=1e-4)
    assert (taken["share"] == 0).all() and taken.loc["all", "worth"] > 1
    said = table[(table["replaced by"] == "said in words") & (table["sense"] == "all")].set_index("words")["share"]
    mean = table[(table["replaced by"] == "mean sense") & (table["sense"] == "all")]["share"].iloc[0]
    another = table[(table["replaced by"] == "another word's words") & (table["sense"] == "all")]["share"].iloc[0]
    assert said[10] > said[1] > max(mean, another)  # of planted text, ten words say much
    by_sense = reading.recovered_by_sense(table)
    assert list(by_sense.columns) == ["1 word", "10 words", "mean sense", "worth"] and len(by_sense) == 8
    assert reading.replacement("said in words", 1) == "said in words, 1 word"
    assert reading.replacement("mean sense", 0) == "mean sense"
    of_three = table[table["sense"] == "3"].set_index(["replaced by", "words"])
    assert by_sense.loc[3, "10 words"] == of_three.loc[("said in words", 10), "share"]
    assert by_sense.loc[3, "mean sense"] == of_three.loc[("mean sense", 0), "share"]
    assert by_sense.loc[3, "worth"] == of_three["worth"].iloc[0]


def test_explanations_by_people_take_the_place_of_those_made_here(trained, rows, words, tmp_path):
    model, tokenizer = trained
    (tmp_path / "mine.csv").write_text("word,sense,up,down\nbat,2,lion horse,coin\n")
    given = reading.given_explanations(str(tmp_path / "mine.csv"), tokenizer, model)
    bat, lion, horse, coin = (token_of_word(tokenizer, word) for word in ("bat", "lion", "horse", "coin"))
    assert given == {(bat, 2): ([lion, horse], [coin])}
    tokens = torch.tensor([bat, lion])
    said = reading_study._with_given(ex.explain(model, tokens, 3, words), tokens, given)
    assert said.up[0, 2].tolist() == [lion, horse, lion] and said.down[0, 2].tolist() == [coin] * 3
    plain = ex.explain(model, tokens, 3, words)
    assert torch.equal(said.up[1], plain.up[1]) and torch.equal(said.up[0, :2], plain.up[0, :2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("word,sense\nbat,1\n", "lacks the column 'up'"),
        ("word,sense,up,down\nbat,one,lion,coin\n", "sense='one' of 'bat' is no number"),
        ("word,sense,up,down\nbat,9,lion,coin\n", "sense=9 is out of range"),
        ("word,sense,up,down\nbat,1,zookeeper,coin\n", "tokens here"),
    ],
)
def test_explanations_that_do_not_fit_are_named(trained, text, message, tmp_path):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        reading.given_explanations(str(tmp_path / "mine.csv"), trained[1], trained[0])
    with pytest.raises(ValueError, match="cannot be read"):
        reading.given_explanations("nothing-here.csv", trained[1], trained[0])


def test_a_language_model_on_this_machine_can_explain(trained, tmp_path):
    model, tokenizer = trained
    model.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    file = reading.explanations_by_model(
        str(tmp_path / "writer"), model, tokenizer, ["bat"], [0, 1], tmp_path / "said.csv"
    )
    given = reading.given_explanations(file, tokenizer, model)
    assert all(up for up, _ in given.values()) and {sense for _, sense in given} <= {0, 1}


def test_a_simulator_needs_words_to_learn_from(trained, words):
    with pytest.raises(ValueError, match="at least 10 words"):
        ex.Simulator.fit(trained[0], ex.explain(trained[0], words[:3], 2, words), words[:3])


# ---------------------------------------------------------------- bigrams


def test_bigrams_are_probabilities_and_what_their_equation_says():
    rows = [[0, 1, 2, 1, 3], [0, 1, 2, 2], [3]]
    counted = Bigrams(rows, 6)
    for x in range(6):
        assert np.exp(counted.log_probs(x)).sum() == pytest.approx(1)
        np.testing.assert_allclose(counted.of_pairs(np.full(6, x), np.arange(6)), counted.log_probs(x))
    after_1 = {2: 2, 3: 1}  # of three
    unigram = (np.bincount([1, 2, 1, 3, 1, 2, 2], minlength=6) + 1) / 13
    for y in range(6):
        slow = max(after_1.get(y, 0) - DISCOUNT, 0) / 3 + DISCOUNT * 2 / 3 * unigram[y]
        assert counted.log_probs(1)[y] == pytest.approx(np.log(slow))
    np.testing.assert_allclose(np.exp(counted.log_probs(5)), unigram)  # never met
    with pytest.raises(ValueError, match="no text to count"):
        Bigrams([[1]], 6)


def test_the_last_tokens_part_is_the_sum_of_its_own_contributions(trained, rows):
    model = trained[0]
    found, E = losses_by_part(model, rows[:1]), trained[0].get_output_embeddings().weight
    ids = torch.tensor(rows[:1])
    with torch.no_grad():
        out = model(ids, output_senses=True)
        for i in range(ids.shape[1] - 1):
            own = sum(out.contextualization[0, l, i, i] * out.senses[0, l, i] for l in range(8))
            plain = sum(out.senses[0, l, i] for l in range(8))
            target = ids[0, i + 1]
            for name, state in (("last token", own), ("last token, renormalised", plain)):
                assert found[name][i] == pytest.approx(-(E @ state).log_softmax(-1)[target].item(), abs=1e-3)
            assert found["model"][i] == pytest.approx(-out.logits[0, i].log_softmax(-1)[target].item(), abs=1e-3)
    assert found["next"].tolist() == rows[0][1:] and found["last"].tolist() == rows[0][:-1]


def test_correlations_with_bigrams_are_spearmans(trained, words):
    model, tokenizer = trained
    counted = Bigrams([ids_of_text(tokenizer, text.text) for text in planted.generate(200)], model.config.vocab_size)
    tokens, among = words[10:14], words[20:60]
    rho, null = bigram_correlations(model, counted, tokens, among)
    E = model.get_output_embeddings().weight[among]
    slow = np.zeros((4, 4, 8))
    for i, x in enumerate(tokens.tolist()):
        for j, other in enumerate(tokens.tolist()):
            counts = counted.log_probs(other)[among] - np.log(counted.unigram[among])
            for l in range(8):
                pushes = (E @ model.sense_vectors(torch.tensor([x]))[0, l]).detach().numpy()
                slow[i, j, l] = spearmanr(pushes, counts).statistic
    np.testing.assert_allclose(rho, np.mean([slow[i, i] for i in range(4)], axis=0), atol=1e-6)
    np.testing.assert_allclose(null, np.mean([slow[i, i - 1] for i in range(4)], axis=0), atol=1e-6)


def test_the_step_at_which_a_loss_settles():
    losses = pd.Series([5.0, 4.0, 3.015, 3.2, 3.01, 3.0], index=[10, 20, 30, 40, 50, 60])
    assert reading.settles(losses) == 50


# ---------------------------------------------------------------- matching


def test_matching_is_the_best_of_all_assignments():
    table = np.random.default_rng(3).normal(size=(5, 5))
    best = max(permutations(range(5)), key=lambda order: table[range(5), order].sum())
    partners, mean = match(table)
    assert tuple(partners) == best and mean == pytest.approx(table[range(5), best].mean())


def test_profiles_are_correlations_beyond_what_all_words_share():
    model, tokens, among = tiny_model(), torch.arange(5, 12), torch.arange(20, 50)
    with torch.no_grad():
        pushes = (model.sense_vectors(tokens) @ model.get_output_embeddings().weight[among].T).double().numpy()
    pushes = pushes - pushes.mean(-1, keepdims=True)
    pushes = pushes - pushes.mean(0)
    slow = np.mean([[np.corrcoef(pushes[n, l], pushes[n, m])[0, 1] for n in range(7)] for l in (0,) for m in (2,)])
    found = profiles(model, tokens, among)
    assert likeness(found, found)[0, 2] == pytest.approx(slow, abs=1e-5)


def test_a_model_with_its_senses_in_another_order_is_matched_to_itself():
    model, tokens, among = tiny_model(num_senses=5), torch.arange(5, 40), torch.arange(5, 60)
    one = profiles(model, tokens, among)
    order = [3, 0, 4, 1, 2]
    partners, mean = match(likeness(one, one[order]))
    assert [order[p] for p in partners] == [0, 1, 2, 3, 4] and mean == pytest.approx(1, abs=1e-5)
    null = match_null(one, one[order], 20)
    assert null.max() < 0.6


def test_two_random_models_are_not_above_the_null():
    found = compare_models(
        tiny_model(0, num_senses=5), tiny_model(1, num_senses=5), torch.arange(5, 40), torch.arange(5, 60)
    )
    assert found["p"] > 0.01 and abs(found["random"]) < 0.1 and found["matched"] > found["random"]


# ---------------------------------------------------------------- what chooses a sense


def test_the_place_chooses_the_sense_on_planted_text(trained):
    model, tokenizer = trained
    texts = reading.choosing_texts("bank", texts=3)
    found = reading_study.choosing_table(model, tokenizer, texts, "bank")
    assert set(found["place"]) == set(reading.PLACES)
    row = found.iloc[4]
    pieces = [piece for piece, _ in texts[int(row["text"])]]
    before = "".join(pieces)
    pieces[int(row["place"])] = f" {row['instead']}"
    weights = []
    for text in (before, "".join(pieces)):
        ids = torch.tensor([ids_of_text(tokenizer, text)])
        with torch.no_grad():
            weights.append(model(ids, output_senses=True).contextualization[0, :, -1, -1])
    assert row["change"] == pytest.approx((weights[0] - weights[1]).abs().sum().item(), abs=1e-4)
    means = found.groupby("place")["change"].mean()
    assert means.idxmax() == 1  # the place, which decides the topic


def test_the_share_of_texts_in_which_the_place_decides_is_counted_over_words_and_texts(trained):
    moves = reading.weights_moved(*trained, ["bank", "bat"])
    assert moves.shape == (2 * 12, 4) and set(moves.columns) == set(reading.PLACES.values())
    slow = reading_study.choosing_table(*trained, reading.choosing_texts("bat"), "bat")
    slow = slow[(slow["text"] == 3) & (slow["place"] == 4)]["change"].mean()
    assert moves.loc[("bat", 3), reading.PLACES[4]] == pytest.approx(slow)
    shares = reading.moves_most(moves)
    assert shares.sum() == pytest.approx(1) and shares[reading.PLACES[1]] > 0.6  # in this training, not in others
    one, two, three, four = reading.PLACES.values()
    counted = reading.moves_most(pd.DataFrame({one: [1.0, 2, 3, 4], two: [2.0, 1, 1, 1], three: 0.0, four: 0.0}))
    assert counted.to_dict() == {one: 0.75, two: 0.25, three: 0, four: 0}


def test_a_text_is_spelled_with_another_piece_at_one_place():
    pieces = [("At the", []), (" zoo", [" lab", " river"]), (",", []), (" Nina", [" Sara"])]
    assert reading.with_piece(pieces) == "At the zoo, Nina"
    assert reading.with_piece(pieces, 1) == "At the lab, Nina" and reading.with_piece(pieces, 3) == "At the zoo, Sara"


def test_the_middle_half_holds_the_mean():
    values = pd.DataFrame({"even": [0.0, 1.0, 2.0, 3.0, 4.0], "one far": [0.0, 0.0, 0.0, 0.0, 10.0]})
    assert reading.middle_half(values).loc["even"].tolist() == [2.0, 1.0, 3.0]
    assert reading.middle_half(values).loc["one far"].tolist() == [2.0, 0.0, 2.0]


# ---------------------------------------------------------------- roles, and the tables that are stored


def test_returning_roles_ask_whether_the_best_senses_are_partners():
    roles = pd.DataFrame(
        [("a", "r", 0, 0.6), ("a", "r", 1, 0.9), ("b", "r", 0, 0.8), ("b", "r", 1, 0.5)],
        columns=["model", "relation", "sense", "auc"],
    )
    found = reading_study.returning_roles(roles, {("a", "b"): np.array([1, 0])})
    assert found.iloc[0][["sense", "other sense", "partners"]].tolist() == [1, 0, True]
    assert not reading_study.returning_roles(roles, {("a", "b"): np.array([0, 1])})["partners"].iloc[0]


@pytest.mark.parametrize(("last", "said"), [(3.0, "improves to the end"), (3.195, "By step 20 of 30")])
def test_the_finding_on_training_is_true_of_what_it_shows(last, said):
    losses, whole = (pd.Series(values, index=[10, 20, 30]) for values in ([4.0, 3.2, last], [4.0, 3.0, 2.5]))
    finding = reading.settling_finding(losses, whole)
    assert finding.lower().startswith(said.lower()) or said in finding


@pytest.mark.slow
def test_a_row_of_each_stored_table_is_what_the_code_gives(shared, monkeypatch):
    monkeypatch.syspath_prepend(str(reading.STORED))
    import make

    valid, corpus = (str(shared / "corpus" / name) for name in ("simple-valid.txt.xz", "simple-[0-3].txt.xz"))
    stored = {file.stem: pd.read_csv(file) for file in reading.STORED.glob("*.csv")}
    lesson = make.open_lesson("06_reading")
    rows = make.valid_rows(lesson.model, lesson.tokenizer, valid)
    found = reading_study.explanation_table(lesson.model, rows, lesson.common, (10,), alone=[6])
    for sense in ("6", "all"):
        of = [t.query(f"sense == '{sense}' and words == 10")["share"].iloc[0] for t in (found, stored["explanations"])]
        assert of[0] == pytest.approx(of[1], abs=5e-3)
    model, tokenizer = load(str(reading.STORED / "seed-0"))
    rows, counted = make.valid_rows(model, tokenizer, valid), make.bigrams_of(tokenizer, corpus)
    last = reading_study.bigram_table({800: model}, rows, counted).iloc[0]
    for name, value in stored["bigrams_over_training"].iloc[-1].drop("step").items():
        assert last[name] == pytest.approx(value, abs=1e-2), name
    by_frequency = reading_study.frequency_table(model, rows, counted).iloc[-1]
    assert by_frequency["counted bigrams"] == pytest.approx(
        stored["bigrams_by_frequency"].iloc[-1]["counted bigrams"], abs=1e-3
    )
    tokens, among = reading.words_to_compare(tokenizer)
    by_sense = reading_study.correlation_table(model, counted, tokens, among)["own bigrams"]
    np.testing.assert_allclose(by_sense, stored["bigrams_by_sense"]["own bigrams"], atol=5e-3)
    texts = first_characters(open_corpus(valid).read(), make.ROLE_CHARACTERS)
    pairs = {"itself": relations_of_text(tokenizer, texts)["itself"]}
    roles = reading_study.roles_table({"seed-0": model}, pairs)["auc"]
    of_seed = stored["roles"].query("model == 'seed-0' and relation == 'itself'")["auc"]
    np.testing.assert_allclose(roles, of_seed, atol=5e-3)
    texts = [text for text in open_corpus(valid).read() if len(text) > 200][:200]
    by_k = stored["senses"].set_index("model").loc["seed-0"]
    assert bits_per_byte(model, tokenizer, texts) == pytest.approx(by_k["bits per byte"], abs=3e-3)
    sets = similarity.read_sets(shared / "lexsim")
    held_out = similarity.held_out_table(similarity.of_model(model, tokenizer), sets)
    assert held_out["rho"].mean() == pytest.approx(by_k["similarity"], abs=5e-3)
