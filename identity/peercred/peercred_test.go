package peercred

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestOf(t *testing.T) {
	dir, err := os.MkdirTemp("", "peer") // short: Unix sockets' paths are
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	for _, network := range []string{"unix", "tcp"} {
		address := filepath.Join(dir, "s")
		if network == "tcp" {
			address = "127.0.0.1:0"
		}
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		out, err := net.Dial(network, l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		in, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		c, err := Of(in)
		if network == "tcp" {
			if err == nil {
				t.Errorf("%v of a TCP connection", c)
			}
			continue
		}
		if groups, gerr := os.Getgroups(); gerr != nil || len(groups) != len(c.Groups) {
			t.Errorf("groups %v; this process has %v, %v", c.Groups, groups, gerr)
		}
		if err != nil || c.UID != uint32(os.Geteuid()) || c.GID != uint32(os.Getegid()) || c.PID != os.Getpid() {
			t.Errorf("%+v, %v; this is uid %d, pid %d", c, err, os.Geteuid(), os.Getpid())
		}
	}
}
