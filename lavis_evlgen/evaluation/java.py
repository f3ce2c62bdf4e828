"""The two Java programs of the COCO caption evaluation, PTBTokenizer and METEOR 1.5, run robustly.

pycocoevalcap ships the jars and this module runs the same commands with the same options. Its own wrappers
are not used because they write into site-packages, decode by the machine's locale, and, when METEOR's process
dies, wait forever for a lock in their destructor.
"""

import shutil
import subprocess
from pathlib import Path

INSTALL_JAVA = "Install a Java runtime (for example `apt-get install default-jre-headless`)."

_COMMON = ["-Dfile.encoding=UTF-8", "-Dsun.jnu.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]


def find_java() -> str | None:
    """Path of a `java` on PATH that really runs, or None (macOS ships a stub that does not)."""
    path = shutil.which("java")
    if path is None:
        return None
    try:
        done = subprocess.run([path, "-version"], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return path if done.returncode == 0 else None


def one_line(text: str) -> str:
    """`text` with every run of white space, Unicode line breaks included, as one space."""
    return " ".join(text.split())


def ptb_tokenize(captions: list[str], java: str) -> list[str]:
    """Captions lower-cased, tokenised by Stanford's PTBTokenizer and freed of punctuation, joined by spaces.

    One Java start for all captions; order and length are kept, an empty caption stays empty. Raises
    `RuntimeError` with Java's own words if the tokenizer fails. Source: pycocoevalcap, Chen et al. 2015
    (Microsoft COCO Captions), section 3.1.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    if not captions:
        return []
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [java, *_COMMON, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    text = "".join(one_line(caption) + "\n" for caption in captions)
    done = subprocess.run(command, input=text.encode("utf-8", "replace"), capture_output=True)
    lines = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode != 0 or len(lines) != len(captions):
        said = done.stderr.decode("utf-8", "replace")[-500:]
        raise RuntimeError(
            f"the PTB tokenizer returned {len(lines)} lines for {len(captions)} captions "
            f"(exit status {done.returncode}): {said}"
        )
    punctuation = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in lines]


class Meteor:
    """METEOR 1.5 (English, `-norm`) in one Java process; use as a context manager. Scale 0 to 1.

    Source: Denkowski and Lavie 2014, Meteor Universal. Needs about 2 GB of memory.
    """

    def __init__(self, java: str):
        from pycocoevalcap.meteor import meteor

        jar = Path(meteor.__file__).with_name(meteor.METEOR_JAR)
        options = ["-Xmx2G", *_COMMON, "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        self._process = subprocess.Popen(
            [java, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def __enter__(self) -> "Meteor":
        return self

    def __exit__(self, *_exception) -> None:
        self._process.kill()
        self._process.communicate()

    def score(self, predictions: list[str], references: list[list[str]]) -> tuple[float, list[float]]:
        """(corpus score, N caption scores) of N tokenised captions against N lists of tokenised references.

        Raises `RuntimeError` if METEOR stops answering.
        """
        statistics = []
        for prediction, own in zip(predictions, references, strict=True):
            sentences = [self._clean(sentence) for sentence in (*own, prediction)]
            statistics.append(self._ask(" ||| ".join(["SCORE", *sentences])))
        # METEOR answers an EVAL line with one line per segment, then the corpus score
        values = [float(self._ask(" ||| ".join(["EVAL", *statistics])))]
        values += [float(self._answer()) for _ in statistics]
        return values[-1], values[:-1]

    @staticmethod
    def _clean(sentence: str) -> str:
        return one_line(sentence.replace("|||", " "))

    def _ask(self, line: str) -> str:
        try:
            self._process.stdin.write(line.encode("utf-8", "replace") + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise RuntimeError(f"METEOR's Java process ended (exit status {self._process.poll()})") from error
        return self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline().decode("utf-8", "replace").strip()
        if not answer:
            raise RuntimeError(f"METEOR's Java process gave no answer (exit status {self._process.poll()})")
        return answer
