# The pocket model from nothing: a rule for each thing that is made. `make pocket` makes what is
# missing; interrupted, it goes on where it was. With -j2 parts that do not need each other are made
# side by side. POCKET=FOLDER makes another one beside it, SEED=N from other random numbers, and
# TEACHER=weights/pocket takes the teacher that is there, and makes the stages only.

POCKET ?= outputs/pocket
SEED ?= 0
RUN := $(BIN)/python -m
PRETRAIN = $(RUN) launch.pretrain --config.folder=$(POCKET) --config.seed=$(SEED)
# what the stages have in common
STAGE = --config.checkpoint=$(POCKET)/ltx2 --config.seed=$(SEED)

pocket: $(POCKET)/student.safetensors $(POCKET)/curves.png
	@echo
	@echo "$(POCKET)/student.safetensors   the student; python -m launch.demo streams from $(POCKET)/student"
	@echo "$(POCKET)/curves.png            how it learnt"

# The text tower is random, and stays so. The shipped one is the one the teacher learnt with.
ifdef TEACHER
TOWER := $(TEACHER)/gemma
else
TOWER := $(POCKET)/gemma_hf
endif

$(POCKET)/gemma_hf/config.json: $(VENV)/.installed-train
	$(RUN) checkpoint_converters.synthetic_gemma --size pocket --dtype float32 \
		--output $(POCKET)/gemma_hf

$(POCKET)/gemma/config.json: $(TOWER)/config.json | $(VENV)/.installed-train
	$(RUN) checkpoint_converters.gemma3 --input $(TOWER) --output $(POCKET)/gemma --overwrite

$(POCKET)/video_vae.safetensors $(POCKET)/audio_vae.safetensors: $(POCKET)/%.safetensors: | $(POCKET)/gemma/config.json
	$(PRETRAIN) --config=configs/pretrain.py:$*

$(POCKET)/vocoder.safetensors: $(POCKET)/audio_vae.safetensors
	$(PRETRAIN) --config=configs/pretrain.py:vocoder

$(POCKET)/causal_decoder.safetensors: $(POCKET)/video_vae.safetensors
	$(PRETRAIN) --config=configs/pretrain.py:causal_decoder

$(POCKET)/teacher.safetensors: $(POCKET)/video_vae.safetensors $(POCKET)/audio_vae.safetensors
	$(PRETRAIN) --config=configs/pretrain.py:teacher

ifdef TEACHER
LTX2 := $(addprefix $(TEACHER)/,teacher.safetensors autoencoders.safetensors vocoder.safetensors)
else
LTX2 := $(POCKET)/ltx2.safetensors
endif

$(POCKET)/ltx2.safetensors: $(POCKET)/teacher.safetensors $(POCKET)/vocoder.safetensors $(POCKET)/causal_decoder.safetensors
	$(RUN) launch.assemble_pocket --folder $(POCKET) --causal-decoder --output $@

$(POCKET)/ltx2/config.json: $(LTX2) | $(VENV)/.installed-train
	$(RUN) checkpoint_converters.ltx2 --input $(LTX2) --output $(POCKET)/ltx2 --overwrite

$(POCKET)/prompts/manifest.json: $(POCKET)/ltx2/config.json | $(POCKET)/gemma/config.json
	$(RUN) launch.make_world --format captions --clips 256 --output $(POCKET)/captions.txt
	$(RUN) launch.encode_prompts --gemma $(POCKET)/gemma --checkpoint $(POCKET)/ltx2 \
		--prompts $(POCKET)/captions.txt --length 48 --output $(POCKET)/prompts

$(POCKET)/stage1.done: $(POCKET)/prompts/manifest.json
	$(RUN) launch.stage1 --config=configs/stage1.py:pocket $(STAGE) \
		--config.data=$(POCKET)/prompts --workdir=$(POCKET)/stage1
	@touch $@

$(POCKET)/ode_pairs.done: $(POCKET)/stage1.done
	$(RUN) launch.ode_pairs --text $(POCKET)/prompts --checkpoint $(POCKET)/ltx2 \
		--generator $(POCKET)/stage1 --frames 49 --layout prefix --height 48 --width 64 \
		--batch-size 8 --clips-per-shard 64 --output $(POCKET)/ode_pairs
	@touch $@

$(POCKET)/stage2.done: $(POCKET)/ode_pairs.done
	$(RUN) launch.stage2 --config=configs/stage2.py:pocket $(STAGE) \
		--config.data=$(POCKET)/ode_pairs --config.generator=$(POCKET)/stage1 \
		--workdir=$(POCKET)/stage2
	@touch $@

$(POCKET)/stage3.done: $(POCKET)/stage2.done
	$(RUN) launch.stage3 --config=configs/stage3.py:pocket $(STAGE) \
		--config.data=$(POCKET)/prompts --config.generator=$(POCKET)/stage2 \
		--workdir=$(POCKET)/stage3
	@touch $@

$(POCKET)/student.safetensors: $(POCKET)/stage3.done
	$(RUN) launch.export_run --run $(POCKET)/stage3 --output $(POCKET)/student --overwrite \
		--safetensors $@

$(POCKET)/curves.png: $(POCKET)/stage3.done
	$(RUN) launch.plot_run $(POCKET)/stage1 $(POCKET)/stage2 $(POCKET)/stage3 --output $@
