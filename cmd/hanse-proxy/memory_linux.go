package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"syscall"
)

// trim gives back what only starting, or a busy time, has needed: heap that is free, and pages of the program itself. Most of a proxy's
// resident memory is code that ran once; what runs again is read again from the page cache.
func trim() error {
	debug.FreeOSMemory()
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer f.Close()
	spans, err := cleanSpans(f, exe)
	if err != nil {
		return err
	}
	for _, s := range spans {
		if _, _, errno := syscall.RawSyscall(syscall.SYS_MADVISE, s.from, s.to-s.from, syscall.MADV_DONTNEED); errno != 0 {
			return fmt.Errorf("madvise %x-%x: %w", s.from, s.to, errno)
		}
	}
	return nil
}

type span struct{ from, to uintptr }

// cleanSpans finds the mappings of a file that nobody can write to and nobody has written to: those with relocations, and data, have nowhere to
// be read from again.
func cleanSpans(smaps io.Reader, file string) (spans []span, err error) {
	var s span
	mapped, known, dirty := false, false, false
	take := func() {
		if mapped && known && !dirty {
			spans = append(spans, s)
		}
	}
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) == 0 {
			continue
		}
		if name, isField := strings.CutSuffix(f[0], ":"); isField {
			if name == "Anonymous" { // copied for having been written to; Private_Dirty also counts a file that is not on disk yet
				known = true
				dirty = len(f) < 2 || f[1] != "0"
			}
			continue
		}
		take()
		mapped, known, dirty = false, false, false
		if len(f) < 6 || strings.Join(f[5:], " ") != file || (f[1] != "r-xp" && f[1] != "r--p") {
			continue
		}
		if _, err := fmt.Sscanf(f[0], "%x-%x", &s.from, &s.to); err != nil {
			return nil, fmt.Errorf("smaps: %q: %w", lines.Text(), err)
		}
		mapped = true
	}
	take()
	return spans, lines.Err()
}
