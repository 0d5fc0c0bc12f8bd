"""The subsets of LongBench: how each asks, how long the answer may be, and what judges it.

Source: LongBench's own configuration (`dataset2prompt.json`, `dataset2maxlen.json`, and the lists in `pred.py` and
`eval.py`). The prompts are data and equal to the published ones, slips of the pen included.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subset:
    """One kind of work.

    Args:
        prompt: a format string of a row's fields `context` and `input`.
        metric: judges the answer.
        max_new_tokens: most tokens to generate.
        chat: whether chat models are asked through their chat template. Few-shot prompts and code are texts to
            be continued, so they are not.
        first_line: whether only the first line of the answer counts: after few-shot examples a model goes on
            to make up further ones.
        chinese: whether the answers are Chinese, and so follow the prompt without a space.
        extended: whether LongBench-E has the subset too.
    """

    prompt: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False
    chinese: bool = False
    extended: bool = False


_PASSAGES = (
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nThe following are given passages.\n{context}\n\n"
    "Answer the question based on the given passages. Only give me the answer and do not output any other "
    "words.\n\nQuestion: {input}\nAnswer:"
)

SUBSETS = {
    "narrativeqa": Subset(
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the question "
        "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
        "Story: {context}\n\n"
        "Now, answer the question based on the story asconcisely as you can, using a single phrase if possible. Do "
        "not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        metric="qa_f1",
        max_new_tokens=128,
    ),
    "qasper": Subset(
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or '
        '"unanswerable". Do not provide any explanation.\n\nArticle: {context}\n\n'
        " Answer the question based on the above article as concisely as you can, using a single phrase or "
        "sentence if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not '
        "provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
        metric="qa_f1",
        max_new_tokens=128,
        extended=True,
    ),
    "multifieldqa_en": Subset(
        "Read the following text and answer briefly.\n\n{context}\n\n"
        "Now, answer the following question based on the above text, only give me the answer and do not output any "
        "other words.\n\nQuestion: {input}\nAnswer:",
        metric="qa_f1",
        max_new_tokens=64,
        extended=True,
    ),
    "multifieldqa_zh": Subset(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
        metric="qa_f1_zh",
        max_new_tokens=64,
        chinese=True,
    ),
    "hotpotqa": Subset(_PASSAGES, metric="qa_f1", max_new_tokens=32, extended=True),
    "2wikimqa": Subset(_PASSAGES, metric="qa_f1", max_new_tokens=32, extended=True),
    "musique": Subset(_PASSAGES, metric="qa_f1", max_new_tokens=32),
    "dureader": Subset(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        metric="rouge_l_zh",
        max_new_tokens=128,
        chinese=True,
    ),
    "gov_report": Subset(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\n"
        "Summary:",
        metric="rouge_l",
        max_new_tokens=512,
        extended=True,
    ),
    "qmsum": Subset(
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in "
        "one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
        metric="rouge_l",
        max_new_tokens=512,
    ),
    "multi_news": Subset(
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\n"
        "Summary:",
        metric="rouge_l",
        max_new_tokens=512,
        extended=True,
    ),
    "vcsum": Subset(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        metric="rouge_l_zh",
        max_new_tokens=512,
        chinese=True,
    ),
    "trec": Subset(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        metric="classification",
        max_new_tokens=64,
        chat=False,
        first_line=True,
        extended=True,
    ),
    "triviaqa": Subset(
        "Answer the question based on the given passage. Only give me the answer and do not output any other "
        "words. The following are some examples.\n\n{context}\n\n{input}",
        metric="qa_f1",
        max_new_tokens=32,
        chat=False,
        first_line=True,
        extended=True,
    ),
    "samsum": Subset(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        metric="rouge_l",
        max_new_tokens=128,
        chat=False,
        first_line=True,
        extended=True,
    ),
    "lsht": Subset(
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
        metric="classification",
        max_new_tokens=64,
        chat=False,
        first_line=True,
        chinese=True,
    ),
    "passage_count": Subset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n"
        "{context}\n\n"
        "Please enter the final count of unique paragraphs after removing duplicates. The output format should "
        "only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        metric="count",
        max_new_tokens=32,
        extended=True,
    ),
    "passage_retrieval_en": Subset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n"
        "{input}\n\n"
        "Please enter the number of the paragraph that the abstract is from. The answer format must be like "
        '"Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: ',
        metric="retrieval",
        max_new_tokens=32,
        extended=True,
    ),
    "passage_retrieval_zh": Subset(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        '下面是一个摘要\n\n{input}\n\n请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        metric="retrieval_zh",
        max_new_tokens=32,
        chinese=True,
    ),
    "lcc": Subset(
        "Please complete the code given below. \n{context}Next line of code:\n",
        metric="code_sim",
        max_new_tokens=64,
        chat=False,
        extended=True,
    ),
    "repobench-p": Subset(
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
        metric="code_sim",
        max_new_tokens=64,
        chat=False,
        extended=True,
    ),
}
"""By name, in the order of `pred.py`."""

EXTENDED = tuple(f"{name}_e" for name, subset in SUBSETS.items() if subset.extended)
"""The subsets of LongBench-E: the same work, with examples spread more evenly over lengths."""

NAMES = (*SUBSETS, *EXTENDED)
