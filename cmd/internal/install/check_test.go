package install

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
)

// Storage is there, is not, or is not known about; a check never takes one for the other.
func TestStorageSaysWhatItKnows(t *testing.T) {
	const list = `{"apiVersion": "storage.k8s.io/v1", "kind": "StorageClassList", "metadata": {}, "items": [%]}`
	class := func(name, isDefault string) string {
		return `{"apiVersion": "storage.k8s.io/v1", "kind": "StorageClass", "metadata": {"name": "` + name + `", "annotations": {"storageclass.kubernetes.io/is-default-class": "` + isDefault + `"}}}`
	}
	for name, c := range map[string]struct {
		status int // 0: nobody listens
		items  string
		ok     bool
		detail string
	}{
		"a default":         {http.StatusOK, class("slow", "false") + "," + class("fast", "true"), true, "StorageClass fast"},
		"no default":        {http.StatusOK, class("slow", "false"), false, "there is no default StorageClass"},
		"may not ask":       {http.StatusForbidden, "", false, "not known whether there is a default StorageClass, without which hansed would wait for its volume: storageclasses: "},
		"API server away":   {0, "", false, "connection refused"},
		"API server broken": {http.StatusInternalServerError, "", false, "not known whether"},
	} {
		t.Run(name, func(t *testing.T) {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(c.status)
				if c.status == http.StatusOK {
					_, _ = w.Write([]byte(strings.Replace(list, "%", c.items, 1)))
				}
			}))
			if c.status == 0 {
				s.Close()
			} else {
				defer s.Close()
			}
			client, err := dynamic.NewForConfig(&rest.Config{Host: s.URL})
			if err != nil {
				t.Fatal(err)
			}
			got := (&Cluster{Context: "west", client: client}).storage(t.Context())
			if got.OK != c.ok || got.Warn == c.ok || !strings.Contains(got.Detail, c.detail) || !c.ok && got.Remedy == "" {
				t.Errorf("%+v, want ok %v and %q", got, c.ok, c.detail)
			}
		})
	}
}
