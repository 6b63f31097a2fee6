import time
import mister_jax.train as t
def test_x(llama_folder, bert_folder, spoken_dir, tmp_path):
    from tests.tasks.test_text_encoder import tiny, scores
    i=0
    for kw in ({"data.batch_size":8}, {"data.batch_size":8,"optimizer.learning_rate":5e-3},{"data.batch_size":8,"head.dropout":0.0,"encoder.lora.dropout":0.0,"loss.gamma":0.0}):
      for f,k in ((llama_folder,"llama_3_2_1b"),(bert_folder,"minilm_l6")):
        b=time.perf_counter(); i+=1
        t.train(tiny(f, spoken_dir,k, **{"train.epochs":8, **kw}), tmp_path/str(i), quiet=True)
        print("train", k, kw, time.perf_counter()-b, scores(tmp_path/str(i)))
