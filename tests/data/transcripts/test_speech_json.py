"""JSON of recognizers and cloud services, each in the shape that its documentation shows."""

import json

import pytest

from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.data.transcripts.utterances import make_utterances
from mister_jax.errors import InputError

HELLO = (Word("Hello,", 0.5, 0.9), Word("you.", 1.0, 1.5))


def item(content, start=None, end=None, **more):
    times = {"start_time": start, "end_time": end} if start else {}
    kind = "pronunciation" if start else "punctuation"
    return {"type": kind, "alternatives": [{"content": content}], **times, **more}


AMAZON_ITEMS = [item("Hello", "0.5", "0.9"), item(","), item("you", "1.0", "1.5"), item(".")]
AMAZON_SPEAKERS = {
    "segments": [
        {
            "start_time": "0.5",
            "end_time": "1.5",
            "speaker_label": "a",
            "items": [
                {"start_time": "0.5", "end_time": "0.9", "speaker_label": "a"},
                {"start_time": "1.0", "end_time": "1.5", "speaker_label": "a"},
            ],
        }
    ]
}

# Case -> name of the format, content of the file, and its only segment.
FILES = {
    "whisper": (
        "Whisper JSON",
        {
            "text": " Hello, you.",
            "segments": [
                {
                    "start": 0.5,
                    "end": 1.5,
                    "text": " Hello, you.",
                    "words": [
                        {"word": " Hello,", "start": 0.5, "end": 0.9, "probability": 0.9},
                        {"word": " you.", "start": 1.0, "end": 1.5, "probability": 0.9},
                    ],
                }
            ],
            "language": "en",
        },
        Segment(0.5, 1.5, "Hello, you.", words=HELLO),
    ),
    "whisperx": (
        "Whisper JSON",
        {
            "segments": [
                {
                    "start": 0.5,
                    "end": 1.5,
                    "text": "Hello, 20",
                    "speaker": "SPEAKER_00",
                    # WhisperX cannot align digits.
                    "words": [{"word": "Hello,", "start": 0.5, "end": 0.9}, {"word": "20"}],
                }
            ],
            "word_segments": [],
        },
        Segment(0.5, 1.5, "Hello, 20", "SPEAKER_00", words=(HELLO[0], Word("20"))),
    ),
    "openai with words only": (
        "JSON with words",
        {
            "task": "transcribe",
            "duration": 1.5,
            "text": "Hello, you.",
            "words": [
                {"word": "Hello,", "start": 0.5, "end": 0.9},
                {"word": "you.", "start": 1, "end": 1.5},
            ],
        },
        Segment(0.5, 1.5, "Hello, you.", words=HELLO),
    ),
    "whisper.cpp": (
        "whisper.cpp JSON",
        {
            "transcription": [
                {
                    "timestamps": {"from": "00:00:00,500", "to": "00:00:01,500"},
                    "offsets": {"from": 500, "to": 1500},
                    "text": " Hello, you.",
                }
            ]
        },
        Segment(0.5, 1.5, "Hello, you."),
    ),
    "amazon with audio segments": (
        "Amazon Transcribe JSON",
        {
            "results": {
                "transcripts": [{"transcript": "Hello, you."}],
                "items": [{**value, "id": index} for index, value in enumerate(AMAZON_ITEMS)],
                "audio_segments": [
                    {
                        "id": 0,
                        "transcript": "Hello, you.",
                        "start_time": "0.25",
                        "end_time": "1.75",
                        "speaker_label": "spk_0",
                        "items": [0, 1, 2, 3],
                    }
                ],
            }
        },
        Segment(0.25, 1.75, "Hello, you.", "spk_0", words=HELLO),
    ),
    "amazon with speakers": (
        "Amazon Transcribe JSON",
        {"results": {"items": AMAZON_ITEMS, "speaker_labels": AMAZON_SPEAKERS}},
        Segment(0.5, 1.5, "Hello, you.", "a", words=HELLO),
    ),
    "amazon call analytics": (
        "Amazon Transcribe Call Analytics JSON",
        {
            "Transcript": [
                {
                    "BeginOffsetMillis": 500,
                    "EndOffsetMillis": 1500,
                    "ParticipantRole": "AGENT",
                    "Content": "Hello, you.",
                    "Items": [
                        {"BeginOffsetMillis": 500, "EndOffsetMillis": 900, "Content": "Hello,"},
                        {"BeginOffsetMillis": 1000, "EndOffsetMillis": 1500, "Content": "you."},
                    ],
                }
            ]
        },
        Segment(0.5, 1.5, "Hello, you.", "AGENT", words=HELLO),
    ),
    "google": (
        "Google Speech-to-Text JSON",
        {
            "name": "1",
            "done": True,
            "response": {
                "results": [
                    {
                        "alternatives": [
                            {
                                "transcript": "Hello, you.",
                                "words": [
                                    {"startTime": "0.500s", "endTime": "0.900s", "word": "Hello,"},
                                    {"startTime": "1s", "endTime": "1.500s", "word": "you."},
                                ],
                            },
                            {"transcript": "Other"},
                        ]
                    },
                    {"resultEndTime": "2s"},
                ]
            },
        },
        Segment(0.5, 1.5, "Hello, you.", words=HELLO),
    ),
    "google version 2": (
        "Google Speech-to-Text JSON",
        {
            "results": [
                {
                    "alternatives": [
                        {
                            "transcript": "Hello, you.",
                            "words": [
                                {
                                    "startOffset": "0.5s",
                                    "endOffset": "0.9s",
                                    "word": "Hello,",
                                    "speakerLabel": "1",
                                },
                                {
                                    "startOffset": "1s",
                                    "endOffset": "1.5s",
                                    "word": "you.",
                                    "speakerLabel": "1",
                                },
                            ],
                        }
                    ]
                }
            ]
        },
        Segment(0.5, 1.5, "Hello, you.", "1", words=HELLO),
    ),
    "azure": (
        "Azure Speech JSON",
        {
            "recognizedPhrases": [
                {
                    "recognitionStatus": "Success",
                    "channel": 0,
                    "speaker": 1,
                    "offset": "PT0.5S",
                    "duration": "PT1S",
                    "offsetInTicks": 5_000_000.0,
                    "durationInTicks": 10_000_000.0,
                    "nBest": [
                        {
                            "lexical": "hello you",
                            "display": "Hello, you.",
                            "displayWords": [
                                {
                                    "displayText": "Hello,",
                                    "offsetInTicks": 5_000_000,
                                    "durationInTicks": 4_000_000,
                                },
                                {
                                    "displayText": "you.",
                                    "offsetInTicks": 10_000_000,
                                    "durationInTicks": 5_000_000,
                                },
                            ],
                        }
                    ],
                }
            ]
        },
        Segment(0.5, 1.5, "Hello, you.", "1", words=HELLO),
    ),
    "azure without ticks": (
        "Azure Speech JSON",
        {
            "recognizedPhrases": [
                {
                    "offset": "PT1M0.5S",
                    "duration": "PT1S",
                    "nBest": [
                        {
                            "display": "Hello.",
                            "words": [{"word": "hello", "offset": "PT1M1S", "duration": "PT0.5S"}],
                        }
                    ],
                }
            ]
        },
        Segment(60.5, 61.5, "Hello.", words=(Word("hello", 61, 61.5),)),
    ),
    "azure fast transcription": (
        "Azure fast transcription JSON",
        {
            "combinedPhrases": [{"text": "Hello, you."}],
            "phrases": [
                {
                    "offsetMilliseconds": 500,
                    "durationMilliseconds": 1000,
                    "text": "Hello, you.",
                    "words": [
                        {"text": "Hello,", "offsetMilliseconds": 500, "durationMilliseconds": 400},
                        {"text": "you.", "offsetMilliseconds": 1000, "durationMilliseconds": 500},
                    ],
                }
            ],
        },
        Segment(0.5, 1.5, "Hello, you.", words=HELLO),
    ),
    "deepgram with utterances": (
        "Deepgram JSON",
        {
            "metadata": {},
            "results": {
                "channels": [{"alternatives": [{"transcript": "hello you", "words": []}]}],
                "utterances": [
                    {
                        "start": 0.5,
                        "end": 1.5,
                        "channel": 0,
                        "speaker": 0,
                        "transcript": "Hello, you.",
                        "words": [
                            {
                                "word": "hello",
                                "punctuated_word": "Hello,",
                                "start": 0.5,
                                "end": 0.9,
                            },
                            {"word": "you", "punctuated_word": "you.", "start": 1.0, "end": 1.5},
                        ],
                    }
                ],
            },
        },
        Segment(0.5, 1.5, "Hello, you.", "0", words=HELLO),
    ),
    "assemblyai": (
        "AssemblyAI JSON",
        {
            "audio_url": "https://example.org/a.wav",
            "text": "Hello, you.",
            "words": [
                {"text": "Hello,", "start": 500, "end": 900, "speaker": "A"},
                {"text": "you.", "start": 1000, "end": 1500, "speaker": "A"},
            ],
            "utterances": None,
        },
        Segment(0.5, 1.5, "Hello, you.", "A", words=HELLO),
    ),
    "assemblyai with utterances": (
        "AssemblyAI JSON",
        {
            "utterances": [
                {
                    "start": 500,
                    "end": 1500,
                    "text": "Hello, you.",
                    "speaker": "A",
                    "words": [
                        {"text": "Hello,", "start": 500, "end": 900, "speaker": "A"},
                        {"text": "you.", "start": 1000, "end": 1500, "speaker": "A"},
                    ],
                }
            ],
            "words": [],
        },
        Segment(0.5, 1.5, "Hello, you.", "A", words=HELLO),
    ),
    "a list of segments": (
        "Whisper JSON",
        [{"start": 0.5, "end": 1.5, "text": "Hello, you.", "speaker": "x"}],
        Segment(0.5, 1.5, "Hello, you.", "x"),
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_times_words_and_speakers_are_read(read, case):
    name, content, segment = FILES[case]
    transcript = read("a.json", json.dumps(content))
    assert transcript.format == name and transcript.notes == ()
    assert transcript.segments == (segment,)


def test_lines_of_json_are_segments(read, times):
    lines = [{"start": 1, "end": 2, "text": "a"}, {"start": 2, "end": 3, "text": "b"}]
    transcript = read("a.jsonl", "\n".join(map(json.dumps, lines)) + "\n")
    assert times(transcript) == [(1, 2, "a"), (2, 3, "b")]


def test_words_become_segments_at_pauses_and_changes_of_speaker(read):
    words = [
        *({"word": "a", "start": 0, "end": 1}, {"word": "b", "start": 2, "end": 3}),
        {"word": "c", "start": 4.5, "end": 5},
        {"word": "d", "start": 5, "end": 6, "speaker": 1},
    ]
    transcript = read("a.json", json.dumps({"words": words}))
    assert transcript.segments == (
        Segment(0, 3, "a b", words=(Word("a", 0, 1), Word("b", 2, 3))),
        Segment(4.5, 5, "c", words=(Word("c", 4.5, 5),)),
        Segment(5, 6, "d", "1", words=(Word("d", 5, 6),)),
    )


def amazon_channel(name, word, start):
    return {"channel_label": name, "items": [item(word, start, str(float(start) + 1)), item(".")]}


def test_channels_are_indices_if_there_are_several(read):
    channels = [amazon_channel("ch_0", "Hi", "0.5"), amazon_channel("ch_1", "Hello", "1.0")]
    results = {"items": AMAZON_ITEMS, "channel_labels": {"channels": channels}}
    segments = read("a.json", json.dumps({"results": results})).segments
    assert [(s.text, s.channel) for s in segments] == [("Hi.", 0), ("Hello.", 1)]
    results["channel_labels"] = {"channels": channels[1:]}
    assert read("a.json", json.dumps({"results": results})).segments[0].channel is None
    words = [[{"word": "a", "start": 0, "end": 1}], [], [{"word": "b", "start": 0.5, "end": 1}]]
    channels = [{"alternatives": [{"words": words}]} for words in words]
    segments = read("a.json", json.dumps({"results": {"channels": channels}})).segments
    assert [(s.text, s.channel) for s in segments] == [("a", 0), ("b", 2)]


def google_word(word, start, end, **more):
    return {"word": word, "startTime": f"{start}s", "endTime": f"{end}s", **more}


def test_google_repeats_all_words_with_speakers(read, times):
    words = [google_word("Hi.", 0, 1), google_word("Bye.", 1, 2)]
    speakers = [words[0] | {"speakerTag": 2}, words[1] | {"speakerTag": 1}]
    results = [{"alternatives": [{"transcript": word["word"], "words": [word]}]} for word in words]
    results.append({"alternatives": [{"words": speakers}]})
    segments = read("a.json", json.dumps({"results": results})).segments
    assert [(s.start, s.text, s.speaker) for s in segments] == [(0, "Hi.", "2"), (1, "Bye.", "1")]


def test_google_results_with_speakers_need_not_be_repeated(read, times):
    results = [
        {"alternatives": [{"words": [google_word("Hi.", 0, 1, speakerTag=1)]}]},
        {"alternatives": [{"words": [google_word("Bye.", 1, 2, speakerTag=2)]}]},
    ]
    assert times(read("a.json", json.dumps({"results": results}))) == [
        (0, 1, "Hi."),
        (1, 2, "Bye."),
    ]


def test_google_leaves_out_zeros(read, times):
    words = [{"word": "Hi", "endTime": "1s"}, {"word": "you", "startTime": "1s", "endTime": "2s"}]
    results = [{"alternatives": [{"words": words}]}]
    assert times(read("a.json", json.dumps({"results": results}))) == [(0, 2, "Hi you")]


def test_a_list_of_google_responses_is_read_completely(read, times):
    responses = [
        {"results": [{"alternatives": [{"words": [google_word("Hello", start, start + 1)]}]}]}
        for start in (0, 5)
    ]
    assert times(read("a.json", json.dumps(responses))) == [(0, 1, "Hello"), (5, 6, "Hello")]
    lines = "\n".join(json.dumps(response) for response in responses)
    assert times(read("a.json", lines)) == [(0, 1, "Hello"), (5, 6, "Hello")]


def test_only_the_final_results_of_a_google_stream_are_read(read, times):
    def response(words, end, **more):
        alternatives = [{"transcript": words}]
        return {"results": [{"alternatives": alternatives, "resultEndTime": end, **more}]}

    responses = [
        response("to", "1s"),
        response("to be", "2s"),
        {"speechEventType": "END_OF_SINGLE_UTTERANCE"},
        response("to be or not", "3s", isFinal=True),
        response("that is", "5s", isFinal=True),
        {"totalBilledTime": "15s"},
    ]
    expected = [(0, 3, "to be or not"), (3, 5, "that is")]
    assert times(read("a.json", json.dumps(responses))) == expected


def test_a_list_of_transcripts_is_refused(read):
    transcript = {"transcription": [{"offsets": {"from": 0, "to": 900}, "text": "Hello."}]}
    assert len(read("a.json", json.dumps([transcript])).segments) == 1
    operation = {"name": "1", "response": {"results": [{"alternatives": [{"transcript": "a"}]}]}}
    for content in (transcript, operation):
        with pytest.raises(InputError, match="a list of 2 objects; needed: one transcript"):
            read("a.json", json.dumps([content, content]))


def test_google_results_without_words_follow_each_other(read, times):
    results = [
        {"alternatives": [{"transcript": "Hi."}], "resultEndTime": "1.5s"},
        {"alternatives": [{"transcript": " Bye."}], "resultEndTime": "3s"},
    ]
    transcript = read("a.json", json.dumps({"results": results}))
    assert times(transcript) == [(0, 1.5, "Hi."), (1.5, 3, "Bye.")]
    assert transcript.notes == ("results without words begin at the end of the result before them",)


def test_segments_without_times_are_left_out(read, times):
    segments = [{"text": "a"}, {"text": "b", "start": None, "end": 2}, {"text": "c", "start": 1}]
    segments.append({"text": "d", "start": 1, "end": 2})
    transcript = read("a.json", json.dumps({"segments": segments}))
    assert times(transcript) == [(1, 2, "d")]
    assert transcript.notes == ("left out 3 segments: without times",)


def spoken(word, start=None, end=None, speaker=None):
    times = {} if start is None else {"start": start, "end": end}
    return {"word": word, **times, **({"speaker": speaker} if speaker else {})}


def test_segments_are_split_where_the_speaker_of_the_words_changes(read):
    words = [
        *(spoken("3"), spoken("So,", 0.5, 1, "A"), spoken("(no", 1.1, 1.4, "B"), spoken("20")),
        *(spoken("-", 1.5, 1.6, "A"), spoken("way!)", 1.7, 2, "B"), spoken("Yes.", 2.1, 2.4, "A")),
    ]
    segments = [
        {"start": 0.2, "end": 2.5, "text": " 3 So, (no 20 - way!) Yes.", "speaker": "A"},
        {"start": 3, "end": 4, "text": "Well.", "speaker": "A"},
    ]
    segments[0]["words"] = words
    segments[1]["words"] = [spoken("Well.", 3, 4, "A")]
    transcript = read("a.json", json.dumps({"segments": segments, "word_segments": words}))
    assert [(it.start, it.end, it.text, it.speaker) for it in transcript.segments] == [
        (0.2, 1, "3 So,", "A"),
        (1.1, 2, "(no 20 - way!)", "B"),
        (2.1, 2.5, "Yes.", "A"),
        (3, 4, "Well.", "A"),
    ]
    assert [len(it.words) for it in transcript.segments] == [2, 4, 1, 1]


def test_speakers_of_words_do_not_remove_text(read):
    words = [spoken("Hi", speaker="A"), spoken("you", speaker="B"), spoken("there", 2, 2, "A")]
    segment = {"start": 0, "end": 3, "text": "Hi you there", "speaker": "A", "words": words}
    segments = read("a.json", json.dumps([segment])).segments
    assert [(it.start, it.end, it.text, it.speaker) for it in segments] == [
        (0, 0.75, "Hi", "A"), (0.75, 2, "you", "B"), (2, 3, "there", "A")
    ]  # fmt: skip
    words[1] |= {"start": 2, "end": 2}
    segments = read("a.json", json.dumps([segment])).segments
    assert [(it.text, it.speaker) for it in segments] == [("Hi you there", "A")]


@pytest.mark.parametrize("key", ["utterances", "words"])
def test_whole_seconds_are_not_milliseconds(read, times, key):
    records = [{"start": 1, "end": 2, "text": "Hi."}, {"start": 5, "end": 15, "text": "So long."}]
    transcript = read("a.json", json.dumps({key: records}))
    assert times(transcript) == [(1, 2, "Hi."), (5, 15, "So long.")]
    assert transcript.notes == (
        "times are seconds, because speech cannot be so fast in milliseconds",
    )
    fractional = [records[0], {"start": 5.5, "end": 15, "text": "So long."}]
    transcript = read("a.json", json.dumps({key: fractional}))
    assert times(transcript)[1] == (5.5, 15, "So long.") and not transcript.notes
    # A complete file of AssemblyAI names the recording.
    content = {"audio_url": "https://example.org/a.wav", key: records}
    assert read("a.json", json.dumps(content)).segments[0].end < 0.02
    fast = [{"start": 0, "end": 300, "text": "A sentence of 30 letters fast."}]
    transcript = read("a.json", json.dumps({key: fast}))
    assert times(transcript)[0][:2] == (0, 0.3) and not transcript.notes


def test_words_without_length_keep_their_start(read):
    words = [{"word": "a", "start": 1, "end": 1}, {"word": "b", "start": 2, "end": 2}]
    segments = [{"start": 1, "end": 3, "text": "a b", "words": words}]
    transcript = read("a.json", json.dumps({"segments": segments}))
    assert transcript.segments[0].words == (Word("a", 1), Word("b", 2))


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"soon"', "[]"])
def test_times_that_are_not_numbers_are_errors(read, value):
    with pytest.raises(InputError, match=r"a\.json: (is damaged|has a segment from)"):
        read("a.json", f'{{"segments": [{{"start": 0, "end": {value}, "text": "a"}}]}}')


@pytest.mark.parametrize("value", [None, 3, "a", [1], {"a": 1}])
def test_damaged_files_are_errors_in_one_line(read, value):
    for _, content, _ in FILES.values():
        if isinstance(content, dict):
            for key in content:
                if isinstance(content[key], list | dict):
                    try:
                        read("a.json", json.dumps(content | {key: value}))
                    except InputError as error:
                        assert "\n" not in str(error)


def test_words_beside_segments_are_given_to_them_by_time(read):
    words = [("One", 0.0, 0.5), ("Two", 1.0, 1.6), ("three", 1.8, 2.1), ("Four", 2.9, 3.3)]
    content = {
        "task": "transcribe",
        "segments": [
            {"id": 0, "start": 0.0, "end": 2.0, "text": " One. Two three!"},
            {"id": 1, "start": 2.0, "end": 2.5, "text": " Hm."},
            {"id": 2, "start": 3.0, "end": 4.0, "text": " Four."},
        ],
        "words": [{"word": word, "start": start, "end": end} for word, start, end in words],
    }
    segments = read("a.json", json.dumps(content)).segments
    # "Four" begins before its segment, in a pause.
    assert [[word.text for word in it.words] for it in segments] == [
        ["One", "Two", "three"], [], ["Four"]
    ]  # fmt: skip
    utterances = make_utterances(segments)
    assert [(it.start, it.end, it.text) for it in utterances] == [
        (0.0, 0.5, "One."), (1.0, 2.0, "Two three!"), (2.0, 2.5, "Hm."), (3.0, 4.0, "Four.")
    ]  # fmt: skip
    content["segments"][0]["words"] = [{"word": "own", "start": 0.0, "end": 2.0}]
    segments = read("a.json", json.dumps(content)).segments
    assert [[word.text for word in it.words] for it in segments] == [["own"], [], []]
