"""A part of a command's --help: a group of arguments, or those that have to do with a word. Works on argparse alone."""

import argparse
import re
from collections import defaultdict

from nanoforge.errors import UserError
from nanoforge.other_names import arguments_called, similar_argument


def topic_help(parser: argparse.ArgumentParser, topic: str) -> str:
    """The groups whose title has a word, and arguments that it names; else those whose help has it. Raises UserError
    where there are none."""
    names = names_of_arguments(parser)
    word = topic.lower().lstrip("-").replace("-", "_")
    by_name = set(arguments_called(word))
    by_name |= {name for name, others in names.items() if any(is_called(other, word) for other in others)}
    found: dict[str, list[argparse.Action]] = {}
    for search_help in (False, True):
        for group in parser._action_groups:
            actions = [action for action in group._group_actions if action.help != argparse.SUPPRESS]
            if not is_title(group.title or "", topic):
                actions = [
                    action
                    for action in actions
                    if action.dest in by_name or (search_help and has_word(action.help or "", topic))
                ]
            if actions:
                found[group.title or ""] = actions
        if found:
            return format_groups(parser, found)
    raise UserError(f"--help={topic}: no group and no argument{similar_argument(word, names)}")


def names_of_arguments(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Argument -> its name and its aliases."""
    names: dict[str, list[str]] = defaultdict(list)
    for action in parser._actions:
        names[action.dest] += [option.lstrip("-") for option in action.option_strings]
    return names


def is_called(name: str, word: str) -> bool:
    """Whether the word is a part of a name: lr of min_lr, but not of already."""
    return f"_{word}_" in f"_{name}_" or (len(word) > 3 and word in name)


def is_title(title: str, topic: str) -> bool:
    """Whether a topic is a word of a group's title, or its beginning."""
    words = re.findall(r"\w+", title.partition(" (")[0].lower())
    topic = topic.lower()
    return topic == title.lower() or any(word == topic or (len(topic) > 3 and word.startswith(topic)) for word in words)


def has_word(text: str, word: str) -> bool:
    """Whether a text has the word, in any case."""
    return re.search(rf"\b{re.escape(word)}", text, re.IGNORECASE) is not None


def format_groups(parser: argparse.ArgumentParser, groups: dict[str, list[argparse.Action]]) -> str:
    """The groups as argparse prints them."""
    formatter = parser._get_formatter()
    for title, actions in groups.items():
        formatter.start_section(title)
        formatter.add_arguments(actions)
        formatter.end_section()
    return formatter.format_help()
