package capture

import (
	"net"
	"testing"
)

func TestBesides(t *testing.T) {
	for _, c := range []struct{ low, high, first, last int }{
		{32768, 60999, 61000, 65535}, {32768, 65000, 16384, 32767}, {4000, 65535, 1024, 3999}, {1024, 65535, 0, 0}, {2000, 65000, 0, 0},
	} {
		if first, last := besides(c.low, c.high); first != c.first || last != c.last {
			t.Errorf("beside %d to %d: %d to %d, want %d to %d", c.low, c.high, first, last, c.first, c.last)
		}
	}
}

// TestApart: no query of the sidecar's leaves by a port that an application is given.
func TestApart(t *testing.T) {
	first, last := apart()
	if first == 0 {
		t.Skip("SKIPPED: the kernel hands out nearly all ports here")
	}
	dial := Apart(&net.Dialer{})
	for range 100 {
		c, err := dial(t.Context(), "udp", "127.0.0.1:53")
		if err != nil {
			t.Fatal(err)
		}
		if p := c.LocalAddr().(*net.UDPAddr).Port; p < first || p > last {
			t.Errorf("port %d is not of %d to %d", p, first, last)
		}
		_ = c.Close()
	}
	c, err := dial(t.Context(), "tcp", "127.0.0.1:1")
	if err == nil {
		_ = c.Close()
	}
}
