package capture

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Rules works on one network namespace.
type Rules struct{ netns string }

// In returns the rules of the namespace that a file names, "/proc/4711/ns/net" say, or of this process's own if it is empty.
func In(netns string) *Rules { return &Rules{netns} }

// open returns a connection, and what closes it.
func (r *Rules) open() (*nftables.Conn, func(), error) {
	if r.netns == "" {
		return open()
	}
	f, err := os.Open(r.netns)
	if err != nil {
		return nil, nil, fmt.Errorf("network namespace: %w", err)
	}
	defer f.Close()
	var c *nftables.Conn
	var done func()
	entered := make(chan struct{})
	go func() { // a socket stays where it was opened; the thread is never unlocked, and ends
		defer close(entered)
		runtime.LockOSThread()
		if err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("enter network namespace %s: %w", r.netns, explain(err))
			return
		}
		c, done, err = open()
	}()
	<-entered
	return c, done, err
}

func open() (*nftables.Conn, func(), error) {
	// A transaction is one message and many answers, which the socket's buffers must hold.
	large := nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(1<<20), c.SetReadBuffer(4<<20))
	})
	c, err := nftables.New(large, nftables.AsLasting())
	if err != nil {
		return nil, nil, fmt.Errorf("open nftables: %w", explain(err))
	}
	return c, func() { _ = c.CloseLasting() }, nil
}

// Install makes the table what cfg says, in one transaction. It is false where it was that already.
func (r *Rules) Install(cfg *Config) (changed bool, err error) {
	if err := cfg.Validate(); err != nil {
		return false, err
	}
	c, done, err := r.open()
	if err != nil {
		return false, err
	}
	defer done()
	if s, err := read(c, cfg); err != nil {
		return false, err
	} else if s.Matches {
		return false, nil
	}
	t := &nftables.Table{Name: cfg.Table, Family: nftables.TableFamilyINet}
	c.AddTable(t) // so that there is one to delete
	c.DelTable(t)
	c.AddTable(t)
	for _, want := range cfg.chains() {
		ch := &nftables.Chain{Name: want.name, Table: t}
		if want.hook != nil {
			p, accept := priority, nftables.ChainPolicyAccept
			ch.Hooknum, ch.Priority, ch.Type, ch.Policy = want.hook, &p, nftables.ChainTypeNAT, &accept
		}
		c.AddChain(ch)
		for _, exprs := range want.rules {
			c.AddRule(&nftables.Rule{Table: t, Chain: ch, Exprs: exprs})
		}
	}
	if err := c.Flush(); err != nil {
		return false, fmt.Errorf("install table inet %s: %w", cfg.Table, explain(err))
	}
	s, err := read(c, cfg)
	if err == nil && !s.Matches {
		err = fmt.Errorf("table inet %s is not as it was installed: %d rules missing, %d surplus; does something else change it?", cfg.Table, len(s.Missing), len(s.Surplus))
	}
	return true, err
}

// Remove takes the table away. It is false where there was none.
func (r *Rules) Remove(table string) (removed bool, err error) {
	c, done, err := r.open()
	if err != nil {
		return false, err
	}
	defer done()
	if found, err := exists(c, table); err != nil || !found {
		return false, err
	}
	c.DelTable(&nftables.Table{Name: table, Family: nftables.TableFamilyINet})
	if err := c.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("remove table inet %s: %w", table, explain(err))
	}
	return true, nil
}

// Show compares what is installed with what cfg says.
func (r *Rules) Show(cfg *Config) (*State, error) {
	c, done, err := r.open()
	if err != nil {
		return nil, err
	}
	defer done()
	return read(c, cfg)
}

// Plan is the table that cfg asks for.
func Plan(cfg *Config) *State {
	s := &State{Table: cfg.Table}
	for _, want := range cfg.chains() {
		ch := Chain{Name: want.name, Rules: []Rule{}}
		if want.hook != nil {
			p := priority
			ch.Hook = hookText(&nftables.Chain{Type: nftables.ChainTypeNAT, Hooknum: want.hook, Priority: &p})
		}
		for _, exprs := range want.rules {
			r := text(exprs)
			r.Packets = nil
			ch.Rules = append(ch.Rules, r)
		}
		s.Chains = append(s.Chains, ch)
	}
	return s
}

func exists(c *nftables.Conn, table string) (bool, error) {
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return false, fmt.Errorf("list tables: %w", explain(err))
	}
	for _, t := range tables {
		if t.Name == table {
			return true, nil
		}
	}
	return false, nil
}

func read(c *nftables.Conn, cfg *Config) (*State, error) {
	s := &State{Table: cfg.Table, Chains: []Chain{}}
	var err error
	if s.Installed, err = exists(c, cfg.Table); err != nil {
		return nil, err
	}
	if s.Installed {
		chains, err := c.ListChainsOfTableFamily(nftables.TableFamilyINet)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", explain(err))
		}
		for _, ch := range chains {
			if ch.Table.Name != cfg.Table {
				continue
			}
			rules, err := c.GetRules(ch.Table, ch)
			if err != nil {
				return nil, fmt.Errorf("list rules of chain %s: %w", ch.Name, explain(err))
			}
			have := Chain{Name: ch.Name, Hook: hookText(ch), Rules: []Rule{}}
			for _, r := range rules {
				have.Rules = append(have.Rules, text(r.Exprs))
			}
			s.Chains = append(s.Chains, have)
		}
	}
	s.compare(Plan(cfg).Chains)
	return s, nil
}

// explain gives what a caller branches on.
func explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w (%w)", ErrPermission, err)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w (%w)", ErrUnsupported, err)
	}
	return err
}
