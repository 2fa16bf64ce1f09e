package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestEtcdRestored puts a snapshot into the place of an etcd on which two hansed run, under load: its revision goes back, and so does all that was
// applied since; what was revoked and distrusted since is not trusted again.
func TestEtcdRestored(t *testing.T) {
	t.Parallel()
	const timers = "timers: {suspect: 3s, recover: 2s, probe: 1s}\n"
	l := newLab(t, timers, "west", "east")
	_, _, etcd := l.overThree(timers)
	m := etcd.members
	is := l.newRoot("west", "one", "")
	l.must("west", "", "trust", "rotate")
	l.newRoot("west", "one", is)
	l.green()
	near, far := l.load("west", payments, 2), l.load("east", payments, 1)

	backup := filepath.Join(l.dir, "backup.db")
	etcd.save(backup, m[0])
	later := filepath.Join(l.dir, "later.yaml")
	l.save(later, "apiVersion: v1\nkind: Service\nmetadata: {namespace: shop, name: later}\nspec:\n  ports: [{name: http, port: 80}]\n")
	l.must("west-2", "", "apply", "-f", later)
	old, err := l.rootOf("west", "one", "old")
	if err != nil {
		t.Fatal(err)
	}
	if d := get[distrusted](l, "west-2", "trust", "distrust", old, "--yes"); len(d.Missing) > 0 {
		t.Errorf("%+v", d)
	}
	l.must("west", "", "trust", "distrust", "east.test", "--yes")
	near.none(l, "before")

	for _, x := range m {
		etcd.lose(x)
	}
	for _, x := range m {
		etcd.restore(backup, x, m...)
		etcd.start(x, "existing", m...)
	}
	etcd.healthy(m...)
	for _, c := range []string{"west", "west-2"} {
		l.eventually(time.Minute, c+" says in its log that etcd was restored, and begins anew", func() error {
			b, err := os.ReadFile(filepath.Join(l.dir, c+"-hansed.log"))
			if err == nil && (!strings.Contains(string(b), "etcd was restored from a backup") || strings.Count(string(b), "hansed starts") != 2) {
				err = fmt.Errorf("%d bytes of log do not", len(b))
			}
			return err
		})
	}
	l.signing("west", 2)
	l.signing("west-2", 2)
	for _, c := range []string{"west", "west-2"} {
		l.eventually(30*time.Second, c+" has what etcd has", func() error {
			if out, err := l.hanse(c, "", "get", "service", "later", "-n", "shop"); err == nil {
				return fmt.Errorf("what was applied later: %s", out)
			}
			return nil
		})
		l.eventually(30*time.Second, c+" does not have the revoked root", func() error {
			for _, a := range get[trustPage](l, c, "trust", "show", "west.test").Authorities {
				if strings.HasPrefix(a, old) {
					return fmt.Errorf("%s", a)
				}
			}
			return nil
		})
		l.eventually(30*time.Second, c+" distrusts what was distrusted", func() error {
			if out := l.must(c, "", "trust", "list", "-o", "json"); !strings.Contains(out, `"all"`) {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
	}
	l.must("west", "", "apply", "-f", later)
	near.none(l, "etcd was restored")
	far.none(l, "etcd was restored")
	near.stop()
	far.stop()
}
