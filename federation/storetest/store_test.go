package storetest_test

import (
	"testing"

	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/storetest"
)

func TestMemory(t *testing.T) {
	storetest.Contract(t, func(*testing.T) (etcd.Store, func(int64)) {
		m := storetest.NewMemory(7)
		return m, m.Compact
	})
}

func TestLink(t *testing.T) {
	storetest.Contract(t, func(*testing.T) (etcd.Store, func(int64)) {
		m := storetest.NewMemory(7)
		return storetest.NewLink(m), m.Compact
	})
}

func TestEmbedded(t *testing.T) {
	storetest.Contract(t, func(t *testing.T) (etcd.Store, func(int64)) {
		e, err := etcd.StartEmbedded(t.Context(), etcd.EmbeddedConfig{Dir: t.TempDir(), Name: "test"})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := e.Close(); err != nil {
				t.Error(err)
			}
		})
		return e.Store(), func(rev int64) {
			if _, err := e.Client().Compact(t.Context(), rev); err != nil {
				t.Fatal(err)
			}
		}
	})
}
