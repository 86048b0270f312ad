"""The page's words in its two languages. The browser's language chooses."""

from web.votes import Votes

ENGLISH = {
    "chat": "Chat",
    "compare": "Compare and vote",
    "model": "Model",
    "model_a": "One model",
    "model_b": "The other (may be the same)",
    "settings": "Settings",
    "system": "System message (chat models only)",
    "max_new_tokens": "Tokens of a reply, at most",
    "temperature": "Temperature (0: always the likeliest token)",
    "top_p": "Top p",
    "repetition_penalty": "Repetition penalty",
    "seed": "Seed (empty: another reply each time)",
    "message": "Ask a chat model, or begin a text for a base model",
    "question": "Question",
    "question_hint": "Both answer it. Which side is whose is shown after the vote. Before you vote "
    "you may improve a reply where it stands: vote for it, and your text is the chosen one.",
    "ask": "Ask both",
    "stop": "Stop",
    "left_reply": "Left",
    "right_reply": "Right",
    "left": "Left is better",
    "right": "Right is better",
    "both_good": "Both good",
    "both_bad": "Both bad",
    "undo": "Undo my last vote",
    "result": "Votes",
    "no_votes": "No votes yet.",
    "revealed": "Left: {left}. Right: {right}.",
    "undone": "The vote is taken back.",
    "nothing_to_undo": "There is no vote of this page to take back.",
    "standing": "{first} against {second}: {count} votes, {wins} won, {losses} lost, {ties} ties; "
    "{rate:.0%} (95 %: {low:.0%} to {high:.0%}).",
    "same_model": "{first} against itself: {count} votes, {ties} of them ties.",
    "file": "{pairs} pairs in {path}: python dpo_train.py --dataset {path}",
}
CHINESE = {
    "chat": "对话",
    "compare": "比较与投票",
    "model": "模型",
    "model_a": "一个模型",
    "model_b": "另一个模型（可以相同）",
    "settings": "设置",
    "system": "系统消息（只对对话模型有效）",
    "max_new_tokens": "回复最多多少词元",
    "temperature": "温度（0：总取概率最大的词元）",
    "top_p": "Top p",
    "repetition_penalty": "重复惩罚",
    "seed": "随机种子（留空：每次都不同）",
    "message": "向对话模型提问，或给预训练模型一个开头",
    "question": "问题",
    "question_hint": "两个模型都来回答。哪边是谁，投票之后才显示。投票之前可以就地改写一个回答："
    "投给它，改写后的文字就是更好的那一个。",
    "ask": "同时提问",
    "stop": "停止",
    "left_reply": "左",
    "right_reply": "右",
    "left": "左边更好",
    "right": "右边更好",
    "both_good": "都好",
    "both_bad": "都不好",
    "undo": "撤销上一票",
    "result": "投票结果",
    "no_votes": "还没有投票。",
    "revealed": "左：{left}。右：{right}。",
    "undone": "已撤销。",
    "nothing_to_undo": "本页没有可以撤销的投票。",
    "standing": "{first} 对 {second}：{count} 票，胜 {wins}，负 {losses}，平 {ties}；"
    "胜率 {rate:.0%}（95 % 区间：{low:.0%} 至 {high:.0%}）。",
    "same_model": "{first} 与自己比：{count} 票，其中平 {ties}。",
    "file": "{path} 里有 {pairs} 对：python dpo_train.py --dataset {path}",
}


def words_for(accept_language: str) -> dict[str, str]:
    """The words for the header Accept-Language, as in `zh-CN,zh;q=0.9,en;q=0.8`."""
    return CHINESE if accept_language.lower().startswith("zh") else ENGLISH


def standings_text(votes: Votes, words: dict[str, str]) -> str:
    """A line for each two models that were compared, and where the pairs are."""
    lines = []
    for standing in votes.standings():
        first, second = standing.models
        rate, low, high = standing.win_rate
        line = words["standing" if first != second else "same_model"]
        counts = {name: getattr(standing, name) for name in ("count", "wins", "losses", "ties")}
        shares = {"rate": rate, "low": low, "high": high}
        lines.append(line.format(first=first, second=second, **counts, **shares))
    if not lines:
        return words["no_votes"]
    return "\n".join([*lines, words["file"].format(path=votes.path, pairs=votes.count_pairs())])
