package sidecar

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/hanse-mesh/hanse/proxy/message"
)

// TestReplay: several tries read the same bytes, until more has come than is kept.
func TestReplay(t *testing.T) {
	b := newReplay(slowly{strings.NewReader("hello")})
	first, _ := b.next()
	if p := make([]byte, 2); must(io.ReadFull(first, p)) != 2 || string(p) != "he" {
		t.Errorf("first try read %q", p)
	}
	second, ok := b.next()
	if all, err := io.ReadAll(second); !ok || err != nil || string(all) != "hello" {
		t.Errorf("second try read %q, %v, %v", all, ok, err)
	}
	if _, err := first.Read(make([]byte, 1)); !errors.Is(err, errStale) {
		t.Errorf("first try reads on: %v", err)
	}
	if n := b.finish(); n != 5 {
		t.Errorf("counted %d", n)
	}
}

func must(n int, _ error) int { return n }

func TestReplayTooLong(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 100_000)
	b := newReplay(slowly{bytes.NewReader(data)})
	r, _ := b.next()
	if all, err := io.ReadAll(r); err != nil || !bytes.Equal(all, data) {
		t.Errorf("read %d bytes, %v", len(all), err)
	}
	if _, ok := b.next(); ok || b.replayable() {
		t.Error("a body that was not kept is given again")
	}
	if len(b.buf) > maxReplay {
		t.Errorf("%d bytes are kept", len(b.buf))
	}
}

// TestReplaySilentCaller: a try can be given up while the caller sends nothing, and the next one gets what comes.
func TestReplaySilentCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pr, pw := io.Pipe()
		b := newReplay(slowly{pr})
		first, _ := b.next()
		ended := make(chan error)
		go func() { _, err := first.Read(make([]byte, 1)); ended <- err }()
		synctest.Wait()
		_ = first.Close()
		if err := <-ended; !errors.Is(err, errStale) {
			t.Errorf("a closed try ended with %v", err)
		}
		second, _ := b.next()
		go func() {
			_, _ = pw.Write([]byte("late"))
			_ = pw.Close()
		}()
		if all, err := io.ReadAll(second); err != nil || string(all) != "late" {
			t.Errorf("second try read %q, %v", all, err)
		}
		b.finish()
	})
}

// TestReplayHandedOver: a try that reads a long body by itself can be given up while the caller sends nothing.
func TestReplayHandedOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pr, pw := io.Pipe()
		b := newReplay(slowly{pr})
		r, _ := b.next()
		go func() { _, _ = pw.Write(make([]byte, 200_000)) }()
		if n, err := io.ReadFull(r, make([]byte, 200_000)); err != nil {
			t.Errorf("%d bytes, %v", n, err)
		}
		ended := make(chan error)
		go func() { _, err := r.Read(make([]byte, 1)); ended <- err }()
		synctest.Wait()
		if !b.handed {
			t.Error("the pump still reads")
		}
		_ = r.Close()
		if err := <-ended; !errors.Is(err, errStale) {
			t.Errorf("a closed try ended with %v", err)
		}
		if n := b.finish(); n != 200_000 {
			t.Errorf("counted %d", n)
		}
	})
}

// slowly has nothing at hand.
type slowly struct{ io.Reader }

func (slowly) Ready() bool { return false }
func (s slowly) CloseRead() {
	if c, ok := s.Reader.(io.Closer); ok {
		_ = c.Close()
	}
}
func (slowly) Trailers() message.Fields { return nil }
