"""Channels between processes of one host, for tensors in CPU memory.

::

    sender                       memory of the channel                       receiver
    copies a message into  ->  slot 0 | slot 1 | slot 2 | ...  ->  computes with the slot itself
    sends the slot's index on a socket  --------------------->  waits on the socket
    takes slots marked free    <-  a mark for each slot    <-  marks a slot free after its last use

The form of messages is sent on the socket, in order with them, whenever it changes. If a message
does not fit into a slot, larger memory is sent along; messages in the old memory are received from
there.

A message costs one copy and one system call at the sender, and one system call at the receiver.
Unlike gloo, a channel needs no thread; only a sender that is far ahead polls. When a process dies,
its socket closes, which its neighbours notice at once.

A received message stays in its slot for as long as anything refers to it: the micro-batch in
flight, its graph, or the user. A receiver that holds so many slots that the sender could run out of
them copies what comes and frees the slot at once. So nothing is overwritten and nothing can get
stuck, whatever a module keeps.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import struct
import tempfile
import time
import weakref
from pathlib import Path

import torch

from paci.errors import WorkerError
from paci.plan.stage_memory import aligned, ring_slot_bytes, ring_slots
from paci.runtime.transport.boundary import Form, Structure, specs_of, tensors_in
from paci.runtime.transport.channel import Bundle, Ends, Receiver, Sender, Tensors
from paci.schedule.action import Message

# Whether this system can: sockets with names in the file system that carry file descriptors.
AVAILABLE = hasattr(socket, "AF_UNIX") and hasattr(socket, "send_fds")

_FREE, _SENT, _HELD = 0, 1, 2
_SLOT = struct.Struct("<H")
_NEWS = 0xFFFF  # in place of a slot: what the next messages look like
_HEADER = struct.Struct("<QI?")  # bytes of a slot, bytes of the description, whether memory comes
_CROWDED_S = 0.001  # between two looks for a free slot, once a sender is far ahead


class Meeting:
    """A socket in the file system on which the sending end of a channel waits for the other.

    Only processes of the same user can connect to it.

    Raises:
        OSError: it cannot be made: the folder for temporary files is not writable, or its path is
            too long for a socket.
    """

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="paci-")
        self.path = str(Path(folder) / "channel")
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listener = undo.enter_context(listener)
            self._listener.bind(self.path)
            self._listener.listen(1)
            self._undo = undo.pop_all()

    def accept(self, timeout_s: float) -> socket.socket:
        """Wait up to ``timeout_s`` seconds for the other end's ``visit``; return the connection.

        Raises:
            OSError: the other end did not come in time.
        """
        self._listener.settimeout(timeout_s)
        connection, _ = self._listener.accept()
        return connection

    def close(self) -> None:
        """Close the listening socket and remove its folder."""
        self._undo.close()


def visit(path: str) -> socket.socket | None:
    """Connect to the ``Meeting`` at ``path``; return None if it cannot be reached.

    It cannot from another host or container.
    """
    try:
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            connection.connect(path)
            undo.pop_all()
            return connection
    except OSError:
        return None


class _Memory:
    """Shared memory with slots for messages, and one byte per slot that marks its state.

    Args:
        file: file descriptor of the memory; closed here.
        slot_bytes: size of a slot in bytes.
        num_slots: number of slots.
    """

    def __init__(self, file: int, slot_bytes: int, num_slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._first = aligned(num_slots)
        self._map = mmap.mmap(file, self._first + num_slots * slot_bytes)
        os.close(file)
        self._bytes = memoryview(self._map)
        self.marks = self._bytes[:num_slots]

    @staticmethod
    def create(slot_bytes: int, num_slots: int) -> tuple[_Memory, int]:
        """Make new memory; return it and a file descriptor to send to the other process.

        It has no name that others could find, and it is freed with the last process that has it.

        Raises:
            WorkerError: the system has not enough memory, or limits its size.
        """
        if hasattr(os, "memfd_create"):
            file = os.memfd_create("paci")
        else:
            with tempfile.TemporaryFile() as unnamed:
                file = os.dup(unnamed.fileno())
        size = aligned(num_slots) + num_slots * slot_bytes
        try:
            os.ftruncate(file, size)
        except OSError as error:
            os.close(file)
            raise WorkerError(
                f"a channel must have {size:,} bytes of shared memory, got {error.strerror!r}; "
                f"raise the limit on file sizes (ulimit -f) or make room, or pass "
                f"share_memory=False"
            ) from error
        return _Memory(os.dup(file), slot_bytes, num_slots), file

    def slot(self, index: int) -> memoryview:
        """Return the bytes of the slot ``index``."""
        start = self._first + index * self.slot_bytes
        return self._bytes[start : start + self.slot_bytes]

    @property
    def addresses(self) -> range:
        """The addresses of all slots in this process."""
        start = torch.frombuffer(self._bytes, dtype=torch.uint8, offset=self._first).data_ptr()
        return range(start, start + self.num_slots * self.slot_bytes)

    def free_slot(self) -> int:
        """Return the first free slot, or -1 if there is none.

        Since the first is taken, few slots are used, and these stay in the cache.
        """
        return self._map.find(bytes((_FREE,)), 0, self.num_slots)

    def num_sent(self) -> int:
        """Return the number of slots whose message was sent and not received yet."""
        return self._map[: self.num_slots].count(_SENT)


class SharedSender(Sender):
    """The sending end of a channel in shared memory.

    Args:
        connection: the socket to the other end.
        ends: the ranks of both ends, and the time-out.
        capacity: messages under way after which a send waits. The channel has twice as many slots,
            because the receiver may hold as many again.
    """

    def __init__(self, connection: socket.socket, ends: Ends, capacity: int) -> None:
        self._connection = _patient(connection, ends.timeout_s)
        self._ends = ends
        self._capacity = capacity
        self._memory: _Memory | None = None
        self._older: list[_Memory] = []  # from which something is still to be received
        self._form: Form | None = None
        self._slots: dict[int, Tensors] = {}  # by index, once used for messages of this form

    def send(self, message: Message, tensors: Tensors, structure: Structure | None = None) -> None:
        """Copy ``tensors`` into a free slot and send its index.

        Wait only if no slot is free, or ``capacity`` messages are under way.
        """
        if self._form is None or not self._form.fits(tensors, structure):
            self._tell(message, Form(specs_of(tensors), structure))
        memory, form = self._memory, self._form
        assert memory is not None
        assert form is not None
        index = memory.free_slot()
        if index < 0 or self._num_under_way(memory) >= self._capacity:
            index = self._wait_for_slot(memory, message)
        places = self._slots.get(index)
        if places is None:
            places = self._slots[index] = tensors_in(memory.slot(index), form.specs)
        for place, tensor in zip(places, tensors, strict=True):
            place.copy_(tensor.detach())
        memory.marks[index] = _SENT
        try:
            self._connection.send(_SLOT.pack(index))
        except OSError as error:
            raise self._failure(message, error) from error

    def seal(self) -> None:
        """Do nothing: the receiver posts nothing ahead."""

    def finish(self) -> None:
        """Do nothing: what was sent is in the shared memory already."""

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _tell(self, message: Message, form: Form) -> None:
        """Send the form of the next messages, and larger memory if slots are too small."""
        text = form.encode()
        needed = ring_slot_bytes([spec.num_bytes for spec in form.specs])
        files: list[int] = []
        before = self._memory
        if before is None:
            self._memory, file = _Memory.create(needed, ring_slots(self._capacity))
            files.append(file)
        elif before.slot_bytes < needed:
            # Half as much again at least: sizes that grow step by step need new memory seldom.
            enough = max(needed, aligned(before.slot_bytes + before.slot_bytes // 2))
            self._older.append(before)
            self._memory, file = _Memory.create(enough, ring_slots(self._capacity))
            files.append(file)
        memory = self._memory
        assert memory is not None
        header = _HEADER.pack(memory.slot_bytes, len(text), bool(files))
        try:
            self._connection.send(_SLOT.pack(_NEWS))
            socket.send_fds(self._connection, [header], files)
            self._connection.sendall(text)
        except OSError as error:
            raise self._failure(message, error) from error
        finally:
            for file in files:
                os.close(file)
        self._form, self._slots = form, {}

    def _num_under_way(self, memory: _Memory) -> int:
        """Return the number of messages sent and not received yet, older memory included."""
        if self._older:
            self._older = [older for older in self._older if older.num_sent()]
        return memory.num_sent() + sum(older.num_sent() for older in self._older)

    def _wait_for_slot(self, memory: _Memory, message: Message) -> int:
        """Wait until a slot is free and few enough messages are under way; return its index."""
        until_s = time.monotonic() + self._ends.timeout_s
        while (index := memory.free_slot()) < 0 or self._num_under_way(memory) >= self._capacity:
            if time.monotonic() > until_s:
                raise self._ends.failure("send", message, timed_out=True)
            try:
                # The other end never says anything: something to read is the end of it.
                self._connection.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                time.sleep(_CROWDED_S)
                continue
            except OSError as error:
                raise self._failure(message, error) from error
            raise self._ends.failure("send", message, timed_out=False)
        return index

    def _failure(self, message: Message, error: OSError) -> Exception:
        return self._ends.failure("send", message, isinstance(error, BlockingIOError))


class SharedReceiver(Receiver):
    """The receiving end of a channel in shared memory.

    Args:
        connection: the socket to the other end.
        ends: the ranks of both ends, and the time-out.
        capacity: the sender's capacity; also the most slots that are held.
    """

    def __init__(self, connection: socket.socket, ends: Ends, capacity: int) -> None:
        self._connection = _patient(connection, ends.timeout_s)
        self._ends = ends
        self._capacity = capacity
        self._memory: _Memory | None = None
        self._form: Form | None = None
        self._held: dict[int, weakref.ref[memoryview]] = {}

    def receive(self, message: Message) -> Bundle:
        """Wait for the next message; its tensors lie in the slot itself.

        If ``capacity`` slots are held already, they are copies.
        """
        (index,) = _SLOT.unpack(self._read(_SLOT.size, message))
        if index == _NEWS:
            self._hear(message)
            (index,) = _SLOT.unpack(self._read(_SLOT.size, message))
        memory, form = self._memory, self._form
        assert memory is not None
        assert form is not None
        slot = memory.slot(index)
        tensors = tensors_in(slot, form.specs)
        if len(self._held) < self._capacity:
            self._hold(memory, index, slot)
        else:
            tensors = tuple(tensor.clone() for tensor in tensors)
            memory.marks[index] = _FREE
        for tensor, spec in zip(tensors, form.specs, strict=True):
            if spec.requires_grad:
                tensor.requires_grad_()
        return Bundle(tensors, form.structure)

    def finish(self) -> None:
        """Do nothing: everything that was sent has been received."""

    def close(self) -> None:
        """Close the connection; tensors that were received stay valid."""
        self._connection.close()

    @property
    def reserved_bytes(self) -> int:
        """The bytes of all slots; the system backs a slot with memory when it is first used."""
        memory = self._memory
        return 0 if memory is None else memory.num_slots * memory.slot_bytes

    def holds(self, address: int) -> bool:
        """Return whether ``address`` lies in a slot of the newest memory."""
        memory = self._memory
        return memory is not None and address in memory.addresses

    def _hold(self, memory: _Memory, index: int, slot: memoryview) -> None:
        """Mark a slot as held, and as free once no tensor refers to it any more."""
        held, marks = self._held, memory.marks
        marks[index] = _HELD

        def free(_: weakref.ref[memoryview]) -> None:
            del held[index]
            marks[index] = _FREE

        held[index] = weakref.ref(slot, free)

    def _hear(self, message: Message) -> None:
        """Receive the form of the next messages, and the new memory if there is one."""
        try:
            header, files, _, _ = socket.recv_fds(self._connection, _HEADER.size, 1)
        except OSError as error:
            raise self._failure(message, error) from error
        if len(header) < _HEADER.size:
            raise self._ends.failure("receive", message, timed_out=False)
        slot_bytes, num_bytes, memory_comes = _HEADER.unpack(header)
        if memory_comes:
            self._memory = _Memory(files[0], slot_bytes, ring_slots(self._capacity))
            # What is held of the old memory stays as it is; nobody asks for its slots any more.
            self._held = {}
        self._form = Form.decode(self._read(num_bytes, message))

    def _read(self, num_bytes: int, message: Message) -> bytes:
        try:
            got = self._connection.recv(num_bytes)
            while 0 < len(got) < num_bytes:
                more = self._connection.recv(num_bytes - len(got))
                if not more:
                    break
                got += more
        except OSError as error:
            raise self._failure(message, error) from error
        if len(got) < num_bytes:
            raise self._ends.failure("receive", message, timed_out=False)
        return got

    def _failure(self, message: Message, error: OSError) -> Exception:
        return self._ends.failure("receive", message, isinstance(error, BlockingIOError))


def _patient(connection: socket.socket, timeout_s: float) -> socket.socket:
    """Make the system end each call on ``connection`` after ``timeout_s`` seconds.

    Python's own time-out would add a system call to every message.
    """
    microseconds = max(1, int(timeout_s * 1e6))  # none would mean no limit
    limit = struct.pack("ll", *divmod(microseconds, 1_000_000))
    connection.settimeout(None)
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, limit)
    return connection
