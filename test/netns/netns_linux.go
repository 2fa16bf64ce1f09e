package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inside names the test that a process was started for.
const inside = "HANSE_NETNS_TEST"

// Test runs f in a process of its own that may make network namespaces.
func Test(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	if os.Getenv(inside) == t.Name() {
		f(t)
		return
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	limit := 5 * time.Minute
	if at, ok := t.Deadline(); ok {
		limit = time.Until(at) - 5*time.Second
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "-test.run=^"+t.Name()+"$", "-test.v", "-test.count=1", fmt.Sprintf("-test.timeout=%s", limit))
	cmd.Env = append(os.Environ(), inside+"="+t.Name())
	// As the first process of a PID namespace it takes all that it has started with it, however it ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	runtime.LockOSThread() // Pdeathsig is of the thread
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		if os.Getenv("HANSE_NO_SKIP") == "" && (errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EINVAL)) {
			t.Skipf("SKIPPED, NOT TESTED: this machine gives no network namespace (%v); run as root, or allow user namespaces", err)
		}
		t.Fatalf("network namespace: %v", err)
	}
	err = cmd.Wait()
	if err != nil || !strings.Contains(out.String(), "--- PASS: "+t.Name()) {
		if strings.Contains(out.String(), "--- SKIP: "+t.Name()) {
			t.Skip(out.String())
		}
		t.Fatalf("in its namespace: %v\n%s", err, out.String())
	}
	if testing.Verbose() {
		t.Log("in its namespace:\n" + out.String())
	}
}

// NS is a network namespace. It goes when the test ends and nothing is left in it.
type NS struct{ f *os.File }

// New makes a namespace with its loopback up.
func New(t testing.TB) *NS {
	t.Helper()
	ns := &NS{}
	inThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Fatalf("network namespace: %v", err)
		}
		f, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		ns.f = f
		return nil
	})
	t.Cleanup(func() { _ = ns.f.Close() })
	ns.do(t, func() error { return up("lo") })
	return ns
}

// Path names the namespace for other programs, while this process runs.
func (ns *NS) Path() string {
	pid, err := os.Readlink("/proc/self") // as /proc has it, which may be that of another PID namespace
	if err != nil {
		pid = "self"
	}
	return fmt.Sprintf("/proc/%s/fd/%d", pid, ns.f.Fd())
}

// inThread runs f in a thread that ends with it, so that no other goroutine finds itself in a namespace that f entered.
func inThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// Do runs f in the namespace. What f opens and starts stays there; goroutines that it starts do not.
func (ns *NS) Do(f func() error) error {
	return inThread(func() error {
		if err := unix.Setns(int(ns.f.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace: %w", err)
		}
		return f()
	})
}

func (ns *NS) do(t testing.TB, f func() error) {
	t.Helper()
	if err := ns.Do(f); err != nil {
		t.Fatal(err)
	}
}

// Listen is net.Listen.
func (ns *NS) Listen(network, address string) (ln net.Listener, err error) {
	err = ns.Do(func() (err error) { ln, err = net.Listen(network, address); return err })
	return ln, err
}

// ListenPacket is net.ListenPacket.
func (ns *NS) ListenPacket(network, address string) (pc net.PacketConn, err error) {
	err = ns.Do(func() (err error) { pc, err = net.ListenPacket(network, address); return err })
	return pc, err
}

// Dial dials an address, which must be numeric. d may be nil.
func (ns *NS) Dial(ctx context.Context, d *net.Dialer, network, address string) (c net.Conn, err error) {
	if d == nil {
		d = &net.Dialer{Timeout: 10 * time.Second}
	}
	err = ns.Do(func() (err error) { c, err = d.DialContext(ctx, network, address); return err })
	return c, err
}

// Start is cmd.Start. cmd must not ask to die with its thread (Pdeathsig), which ends at once.
func (ns *NS) Start(cmd *exec.Cmd) error { return ns.Do(cmd.Start) }

// Output runs a command, and returns what it wrote to both its outputs.
func (ns *NS) Output(cmd *exec.Cmd) (string, error) {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := ns.Start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// Join joins two namespaces by a cable. Each end gets its addresses with their prefix lengths, separated by commas.
func Join(t testing.TB, a, b *NS, addressesA, addressesB string) {
	t.Helper()
	links++
	nameA, nameB := fmt.Sprintf("v%da", links), fmt.Sprintf("v%db", links)
	a.do(t, func() error {
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: nameA}, PeerName: nameB, PeerNamespace: netlink.NsFd(b.f.Fd())})
	})
	a.do(t, func() error { return configure(nameA, addressesA) })
	b.do(t, func() error { return configure(nameB, addressesB) })
}

var links int // used by the test's goroutine only

// Route adds a route by a gateway; "default" is 0.0.0.0/0 or ::/0, by the gateway's family.
func (ns *NS) Route(t testing.TB, to, via string) {
	t.Helper()
	ns.do(t, func() error {
		r := &netlink.Route{Gw: net.ParseIP(via)}
		if to != "default" {
			dst, err := netlink.ParseIPNet(to)
			if err != nil {
				return err
			}
			r.Dst = dst
		} else if r.Gw.To4() == nil {
			r.Dst = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
		} else {
			r.Dst = &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}
		}
		if err := netlink.RouteAdd(r); err != nil {
			return fmt.Errorf("route %s via %s: %w", to, via, err)
		}
		return nil
	})
}

// Forward lets packets through from one cable to another.
func (ns *NS) Forward(t testing.TB) {
	t.Helper()
	ns.do(t, func() error {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
			return err
		}
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0)
	})
}

// Address adds addresses to the loopback.
func (ns *NS) Address(t testing.TB, addresses string) {
	t.Helper()
	ns.do(t, func() error { return configure("lo", addresses) })
}

func up(name string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("link %s: %w", name, err)
	}
	return netlink.LinkSetUp(l)
}

func configure(name, addresses string) error {
	if err := up(name); err != nil {
		return err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	for a := range strings.SplitSeq(addresses, ",") {
		addr, err := netlink.ParseAddr(strings.TrimSpace(a))
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD // usable at once
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("address %s on %s: %w", a, name, err)
		}
	}
	return nil
}
