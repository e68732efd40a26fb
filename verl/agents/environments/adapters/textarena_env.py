"""Games of TextArena, `textarena:NAME`: alone, or against opponents that are random or follow a script.

https://github.com/LeonGuertler/TextArena
"""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.agents.environments.adapters.text_actions import action_text
from verl.agents.environments.observation import Observation
from verl.utils.user_code import load_function

_MOVE = re.compile(r"\[([^\[\]\n]{1,32})\]")
_MAX_PLAYERS = 15


class TextArenaEnvironment:
    """One game.

    Args:
        name: of the game, such as GuessTheNumber-v0.
        opponent: random (a move among those that the game shows in brackets), a list of moves that are made
            in turn, or "file.py:function" of yours that gets the text of the game and returns a move.
        player: number of the policy among the players; None: drawn by the seed.
        players: number of players; None: the smallest that the game takes.
        **options: of the game.
    """

    def __init__(
        self,
        name: str,
        opponent: str | Sequence[str] = "random",
        player: int | None = None,
        players: int | None = None,
        **options: Any,
    ) -> None:
        textarena = importlib.import_module("textarena")
        self._game = textarena.make(name, **options)
        while isinstance(self._game, textarena.Wrapper):  # their texts repeat the whole game in each turn
            self._game = self._game.env
        self._action_kind = textarena.ObservationType.PLAYER_ACTION
        self._player, self._players = player, players
        self._opponent = self._move_function(opponent)
        self._seen: dict[int, str] = {}
        self._is_done = False

    def reset(self, seed: int) -> str:
        """Rules and the first state, after the moves of opponents that come first."""
        players = self._started(seed % 2**31)
        self._random = random.Random(seed)
        if self._player is None:
            self._player = self._random.randrange(players)
        elif not 0 <= self._player < players:
            raise ValueError(f"need a player below {players}, got {self._player}")
        self._let_others_move()
        return self._text_for(self._player)

    def step(self, message: Mapping[str, Any]) -> Observation:
        """State after a move of the policy and those of its opponents; text without brackets gets them."""
        move = action_text(message)
        self._is_done, _ = self._game.step(move if "[" in move or "]" in move else f"[{move}]")
        invalid = float(self._game.state.error_count > 0) if hasattr(self._game.state, "error_count") else 0.0
        self._let_others_move()
        text = "" if self._is_done else self._text_for(self._game.state.current_player_id)
        return Observation(text, None, self._is_done, {"invalid_moves": invalid} if invalid else {})

    def get_reward(self) -> float:
        """The game's reward of the policy; 0 for a game that was not played to its end."""
        rewards = self._game.state.rewards or {}
        return float(rewards.get(self._player, 0.0))

    def _started(self, seed: int) -> int:
        """Begin the game; returns the number of players."""
        counts = range(1, _MAX_PLAYERS + 1) if self._players is None else [self._players]
        refusal: Exception | None = None
        for count in counts:
            try:
                self._game.reset(num_players=count, seed=seed)
                return count
            except AssertionError as error:  # it is for another number of players
                refusal = error
        raise ValueError(
            f"the game does not start with {self._players or 'any number of'} players: {refusal}"
        )

    def _let_others_move(self) -> None:
        while not self._is_done and (mover := self._game.state.current_player_id) != self._player:
            text = self._text_for(mover)
            self._seen[mover] = f"{self._seen.get(mover, '')}\n{text}"
            self._is_done, _ = self._game.step(self._opponent(self._seen[mover]))
            if self._is_done and self._game.state.game_info[mover].get("invalid_move"):
                raise RuntimeError(
                    "the opponent made no valid move, which would end the game as won; give moves of this "
                    "game in the option opponent, or a function"
                )

    def _text_for(self, player: int) -> str:
        """New messages to a player, without their own moves."""
        _, messages = self._game.get_observation()
        names = self._game.state.role_mapping
        lines = []
        for sender, text, kind in messages:
            if kind is self._action_kind and sender == player:
                continue
            lines.append(f"[{names.get(sender, f'Player {sender}')}] {text}" if sender >= 0 else str(text))
        return "\n".join(lines).strip()

    def _move_function(self, opponent: str | Sequence[str]) -> Callable[[str], str]:
        if opponent == "random":
            return self._random_move
        if isinstance(opponent, str):
            return load_function(opponent, user="opponent")
        if not opponent:
            raise ValueError("need at least one move as opponent, got an empty list")
        moves = list(opponent)

        def next_move(text: str) -> str:
            moves.append(moves.pop(0))
            return str(moves[-1])

        return next_move

    def _random_move(self, text: str) -> str:
        """A move among those in brackets of the last lines that have some."""
        for line in reversed(text.splitlines()):
            if found := _MOVE.findall(line):
                return f"[{self._random.choice(found)}]"
        raise RuntimeError("the game shows no moves in brackets; give moves in the option opponent")
