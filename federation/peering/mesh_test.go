package peering_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
)

var payments = discovery.Name{Namespace: "shop", Name: "payments"}

func TestTwoClusters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east := w.add("west"), w.add("east")
		west.export(payments, 3)
		east.export(payments, 2)
		if err := w.join("east", "west"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		for _, c := range []*cluster{west, east} {
			imp := c.mesh.Load().Clusterset().Imports[payments]
			if imp == nil || len(imp.From) != 2 || len(imp.From[0].Endpoints)+len(imp.From[1].Endpoints) != 5 {
				t.Errorf("%s imports %+v; status %+v", c.name, imp, c.mesh.Load().Status())
			}
		}
	})
}
