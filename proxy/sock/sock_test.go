package sock_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/proxy/sock"
)

// pair is a wrapped connection and its plain peer.
func pair(t *testing.T, network, address string) (net.Conn, net.Conn) {
	t.Helper()
	ln, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	peer, err := net.Dial(network, ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { peer.Close(); c.Close() })
	return sock.Wrap(c), peer
}

func each(t *testing.T, f func(t *testing.T, c, peer net.Conn)) {
	t.Run("tcp", func(t *testing.T) {
		c, peer := pair(t, "tcp", "127.0.0.1:0")
		f(t, c, peer)
	})
	t.Run("unix", func(t *testing.T) {
		c, peer := pair(t, "unix", filepath.Join(t.TempDir(), "s"))
		f(t, c, peer)
	})
}

func TestBytesBothWaysAndHalfClose(t *testing.T) {
	each(t, func(t *testing.T, c, peer net.Conn) {
		data := make([]byte, 8<<20) // more than the kernel holds: writes wait
		_, _ = rand.Read(data)
		var all sync.WaitGroup
		all.Go(func() {
			if n, err := c.Write(data); n != len(data) || err != nil {
				t.Error(n, err)
			}
			if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		all.Go(func() {
			if _, err := peer.Write(data); err != nil {
				t.Error(err)
			}
			if err := peer.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Error(err)
			}
		})
		for _, from := range []net.Conn{c, peer} {
			all.Go(func() {
				if got, err := io.ReadAll(from); err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			})
		}
		all.Wait()
	})
}

func TestDeadlinesWakeWhatWaits(t *testing.T) {
	each(t, func(t *testing.T, c, _ net.Conn) {
		var timeout net.Error
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := c.Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		_ = c.SetReadDeadline(time.Time{})
		read := make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			read <- err
		}()
		time.Sleep(5 * time.Millisecond)
		_ = c.SetReadDeadline(time.Unix(1, 0))
		if err := <-read; !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(err)
		}
		much := make([]byte, 64<<20)
		_ = c.SetWriteDeadline(time.Now().Add(200 * time.Millisecond))
		if n, err := c.Write(much); n == 0 || n == 64<<20 || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Error(n, err)
		}
	})
}

func TestCloseWakesWhatWaits(t *testing.T) {
	each(t, func(t *testing.T, c, _ net.Conn) {
		read := make(chan error, 1)
		go func() {
			_, err := c.Read(make([]byte, 1))
			read <- err
		}()
		time.Sleep(5 * time.Millisecond)
		_ = c.Close()
		if err := <-read; !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
		if _, err := c.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	})
}

func TestErrorsAreNamed(t *testing.T) {
	c, peer := pair(t, "tcp", "127.0.0.1:0")
	_ = peer.(*net.TCPConn).SetLinger(0)
	_ = peer.Close()
	_, err := c.Read(make([]byte, 1))
	var op *net.OpError
	if !errors.Is(err, syscall.ECONNRESET) || !errors.As(err, &op) || op.Op != "read" || op.Addr == nil {
		t.Errorf("%v", err)
	}
	_, err = c.Write([]byte("x"))
	if !errors.Is(err, syscall.EPIPE) || !errors.As(err, &op) || op.Op != "write" {
		t.Errorf("%v", err)
	}
}

func TestOthersAreLeftAlone(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if sock.Wrap(a) != a {
		t.Error("a pipe was wrapped")
	}
	c, _ := pair(t, "tcp", "127.0.0.1:0")
	if sock.Wrap(c) != c {
		t.Error("wrapped twice")
	}
}

func TestReadsAndWritesDoNotAllocate(t *testing.T) {
	c, peer := pair(t, "tcp", "127.0.0.1:0")
	go func() { _, _ = io.Copy(peer, peer) }()
	buf := make([]byte, 64)
	if n := testing.AllocsPerRun(100, func() {
		if _, err := c.Write(buf); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, buf); err != nil {
			t.Fatal(err)
		}
	}); n > 0.5 {
		t.Errorf("%v allocations", n)
	}
}

// late counts who holds it.
type late struct {
	buf   [64]byte
	taken bool
}

func (l *late) Take() []byte { l.taken = true; return l.buf[:] }
func (l *late) Give()        { l.taken = false }

// TestLateReads: a buffer is held with bytes in it only.
func TestLateReads(t *testing.T) {
	each(t, func(t *testing.T, c, peer net.Conn) {
		r, ok := c.(interface {
			ReadLate(sock.LateBuffer) (int, error)
		})
		if !ok {
			t.Skip("only where sockets are wrapped")
		}
		var b late
		go func() {
			time.Sleep(20 * time.Millisecond)
			_, _ = peer.Write([]byte("late"))
		}()
		if n, err := r.ReadLate(&b); err != nil || string(b.buf[:n]) != "late" || !b.taken {
			t.Errorf("%q, %v, held %t", b.buf[:n], err, b.taken)
		}
		b.Give()
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if n, err := r.ReadLate(&b); !errors.Is(err, os.ErrDeadlineExceeded) || n != 0 || b.taken {
			t.Errorf("deadline: %d, %v, held %t", n, err, b.taken)
		}
		if n, err := r.ReadLate(&b); !errors.Is(err, os.ErrDeadlineExceeded) || n != 0 || b.taken {
			t.Errorf("past the deadline: %d, %v, held %t", n, err, b.taken)
		}
		_ = c.SetReadDeadline(time.Time{})
		_ = peer.Close()
		if n, err := r.ReadLate(&b); err != io.EOF || n != 0 || b.taken {
			t.Errorf("end: %d, %v, held %t", n, err, b.taken)
		}
		_ = c.Close()
		if n, err := r.ReadLate(&b); !errors.Is(err, net.ErrClosed) || n != 0 || b.taken {
			t.Errorf("closed: %d, %v, held %t", n, err, b.taken)
		}
	})
}
